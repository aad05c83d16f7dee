"""Rank 0: it runs the command, and has every call of the model made on all ranks."""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..assembly import Assembled
from ..errors import FlashError, NotEnoughMemory
from ..load_options import LoadOptions
from ..memory.slots import CLOSED
from ..memory.stats import Stats
from ..memory_size import parse_memory
from ..run import RankReport
from ..storage.layout import dtype_name
from .control import Link, Message, die
from .division import Divide, Facts, agree, cut, held_by_all
from .group import Group
from .mirror import Mirror
from .paths import portable
from .unbroken import no_interrupts, told_in_peace


class Lead:
    """What rank 0 does for a model that several ranks run.

    Attributes:
        group: All ranks.
        names: Of all ranks.
    """

    def __init__(self, group: Group, links: Sequence[Link], name: str):
        self.group = group
        self.names = [name, *(link.name for link in links)]
        self._links = links
        self._lock = threading.RLock()  # one call of any model at a time
        self._models = 0
        self._dropped: list[int] = []  # models that nobody has any more, nor closed

    def load(
        self,
        load: Callable[[Divide], Any],
        path: str | Path,
        memory: int | float | str,
        options: LoadOptions,
    ) -> Any:
        """Load a model on all ranks.

        Args:
            load: Loads this rank's share, given what divides the model.
            path, memory, options: What the others load by.

        Raises:
            FlashError: As `load`, and if another rank cannot load its share, or has
                another model.
        """
        with self._lock:
            self.settle()
            number = self._models
            self._models += 1
            how = {"path": portable(path), "memory": memory, "options": _plain(options)}
            self.tell({"do": "load", "model": number, **how})
            model_bytes = 0
            asked, divided = True, False  # the others answer what they have

            def divide(parts: Assembled, facts: Facts) -> Assembled:
                nonlocal asked, divided, model_bytes
                asked = False
                model_bytes = parts.manifest.resident.bytes + facts.on_flash_bytes
                found = [facts, *map(Facts.from_json, self._answers())]
                shares = agree(found, self.names, options.shares)
                count, sum_s = len(parts.layers), self.group.latency_s
                whole = held_by_all(found, shares, count, sum_s)
                unlike = len({rank.computes_on for rank in found}) > 1
                one = self.group.of_rank_0 if unlike else None
                mine = cut(parts, shares, 0, self.group.sum, whole, one)
                asked = divided = True  # they answer once more, when they have loaded
                agreed = {"shares": shares, "whole": whole, "unlike": unlike}
                self.tell({"do": "divide", **agreed})
                return mine

            try:
                loaded = load(divide)
            except BaseException as error:
                if asked:
                    self._drop_answers()
                if divided:
                    self.tell({"do": "unload", "model": number})
                else:
                    why = str(error) or type(error).__name__
                    self.tell({"do": "refuse", "why": why})
                raise
            try:
                self._answers()
            except BaseException:
                self.tell({"do": "unload", "model": number})
                loaded[0].flash.close()
                raise
            flash = loaded[0].flash
            flash.machines = LedModel(self, number, model_bytes)
            # The collector comes at any moment: `settle` is one that suits the others.
            weakref.finalize(flash, self._dropped.append, number).atexit = False
            return loaded

    def tell(self, message: Message) -> None:
        """Send a message to all others."""
        for link in self._links:
            link.send(message)

    def settle(self) -> None:
        """Wait until no sum is under way, before the others are told of anything."""
        self.group.settle()
        while self._dropped:
            self.tell({"do": "unload", "model": self._dropped.pop()})

    def ask(self, message: Message) -> list[Any]:
        """What each of the others answers, in the order of ranks.

        Raises:
            FlashError: If one of them could not do it.
        """
        with self._lock, no_interrupts():
            self.settle()
            self.tell(message)
            return self._answers()

    def end(self) -> None:
        """Let the others go, once they have what they wait for."""
        self.settle()
        for link in self._links:
            link.end()

    @contextmanager
    def together(self) -> Iterator[None]:
        """End all ranks if this one stops within: the others wait in a sum for ever."""
        try:
            yield
        except BaseException as error:
            why = f"{self.names[0]}: {error or type(error).__name__}"
            self.tell({"do": "lost", "why": why})
            die(why)

    def _answers(self) -> list[Any]:
        answers = []
        failed: Message | None = None
        with no_interrupts():
            found = [self._answer(link) for link in self._links]
        for link, answer in zip(self._links, found, strict=True):
            if "error" in answer and failed is None:
                failed = answer | {"error": f"{link.name}: {answer['error']}"}
            answers.append(answer.get("answer"))
        if failed is None:
            return answers
        if "least_bytes" in failed:
            raise NotEnoughMemory(failed["error"], failed["least_bytes"])
        raise FlashError(failed["error"])

    def _drop_answers(self) -> None:
        with no_interrupts():
            for link in self._links:
                self._answer(link)

    def _answer(self, link: Link) -> Message:
        answer = link.received.get()
        if answer is None or answer.get("do") == "bye":
            die(f"{link.name} ended. All ranks stop.")
        assert answer is not None
        return answer


class LedModel:
    """One model, as rank 0 has it: makes every call on all ranks."""

    def __init__(self, lead: Lead, number: int, model_bytes: int):
        self.lead = lead
        self._model_bytes = model_bytes
        self._number = number
        self._mirror = Mirror()
        self._closed = False

    def __call__(
        self,
        model: nn.Module,
        inputs: mx.array,
        cache: Sequence[Any] | None,
        run: Callable[[int], mx.array],
    ) -> mx.array:
        """Call the model on all ranks.

        Args:
            inputs: Token ids [B, L].
            run: Makes the call here, in chunks of so many tokens of each sequence.

        Raises:
            FlashError: If a rank has no room for it. Nothing was computed then.
        """
        lead = self.lead
        if not inputs.size:
            raise FlashError("A model is called with one token or more.")
        with lead._lock, no_interrupts(), told_in_peace(model.flash):
            self._check_open()
            lead.settle()
            message: Message = {"do": "call", "model": self._number}
            message["tokens"] = inputs.tolist()
            arrays: list[mx.array] = []
            if cache is not None:
                message["cache"], arrays = self._mirror.describe(cache)
            lead.tell(message)
            with lead.together():
                for array in arrays:
                    lead.group.copy(array, (), dtype_name(array.dtype))
            size = self._agreed_size(model, inputs, cache)
            with lead.together():
                logits = run(size)
                if cache is not None:
                    self._mirror.note(cache)
            return logits

    def _agreed_size(
        self, model: nn.Module, inputs: mx.array, cache: Sequence[Any] | None
    ) -> int:
        """Tokens of a chunk that all ranks have room for."""
        B, L = inputs.shape
        try:
            size = model.flash.pool.prepare(B, L, cache) if cache is not None else B * L
        except BaseException:
            self.lead._drop_answers()
            self.lead.tell({"do": "go", "size": 0})
            raise
        try:
            sizes = self.lead._answers()
        except FlashError:
            self.lead.tell({"do": "go", "size": 0})
            raise
        size = max(min([size, *sizes]) // B, 1)
        self.lead.tell({"do": "go", "size": size})
        return size

    def resize(self, memory: int | float | str) -> int | float | str:
        """Have the others hold more or less memory, each for itself.

        Returns:
            What this rank should hold: a share of memory is one of the whole model.
        """
        share = parse_memory(memory)
        if isinstance(share, float):
            memory = int(share * self._model_bytes)
        self._ask({"do": "resize", "memory": memory})
        return memory

    def stats(self) -> list[dict[str, Any]]:
        """What each of the others has counted since it loaded the model."""
        return self._ask({"do": "stats"})

    def ranks(self, mine: Stats) -> list[RankReport]:
        """What each rank has read since the model was loaded; `mine` is rank 0's."""
        counted = [mine, *(Stats.of(found) for found in self.stats())]
        sums = self.lead.group.sums
        return [
            RankReport(name, stats.bytes_read, stats.hit_rate, sums)
            for name, stats in zip(self.lead.names, counted, strict=True)
        ]

    def close(self) -> None:
        """Have the others close the model, after the call that is under way."""
        with self.lead._lock:
            if not self._closed:
                self._closed = True
                self.lead.tell({"do": "unload", "model": self._number})

    def _ask(self, message: Message) -> list[Any]:
        with self.lead._lock:
            self._check_open()
            return self.lead.ask(message | {"model": self._number})

    def _check_open(self) -> None:
        """The others do not answer for a model that they have closed."""
        if self._closed:
            raise FlashError(CLOSED)


def _plain(options: LoadOptions) -> dict[str, Any]:
    """Options as JSON has them, without those that are rank 0's own.

    Raises:
        FlashError: If one of them cannot be sent to another machine.
    """
    if options.trace is not None:
        raise FlashError("--trace divides memory on one machine alone. Leave it out.")
    if not isinstance(options.policy, str):
        raise FlashError("On several machines a policy is named: lru, lrfu or window.")
    told = asdict(options) | {"draft_model": None, "progress": False}
    return {k: str(v) if isinstance(v, Path) else v for k, v in told.items()}
