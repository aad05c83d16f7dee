"""Every rank but 0: it does what rank 0 says, until that says goodbye."""

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn

from ..assembly import Assembled
from ..errors import FlashError, NotEnoughMemory
from ..load_options import LoadOptions
from ..memory.stats import Stats
from ..run import RankReport
from .control import Link, Message, die, messages
from .division import Divide, Facts, cut
from .group import Group
from .mirror import Copies
from .paths import on_rank

Load = Callable[[str | Path, int | float | str, LoadOptions, Divide], Any]


class Refused(Exception):
    """Rank 0 does not go on with a load or a call."""


class Follower:
    """A rank that follows rank 0.

    Args:
        group: All ranks.
        link: To rank 0.
        name: Of this rank, for messages.
    """

    def __init__(self, group: Group, link: Link, name: str):
        self.group = group
        self._link = link
        self._name = name
        self._coming = messages(link, self._give_way)
        self._models: dict[int, FollowedModel] = {}

    def follow(self, load: Load) -> NoReturn:
        """Do what rank 0 says, and end this process when it says goodbye.

        Args:
            load: Loads this rank's share of a model, given what divides it.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what it means
        for message in self._coming:
            self._do(message, load)
        self._link.end()
        sys.exit(0)

    def next(self) -> Message:
        """Rank 0's next message, in the middle of what it began."""
        for message in self._coming:
            return message
        sys.exit(1)

    def answer(self, work: Callable[[], Any]) -> bool:
        """Do some work, and send rank 0 what it gives, or why it failed.

        Returns:
            Whether it was done.
        """
        try:
            answer = work()
        except FlashError as error:
            message: Message = {"error": str(error)}
            if isinstance(error, NotEnoughMemory):
                message["least_bytes"] = error.least_bytes
            self._link.send(message)
            return False
        self._link.send({"answer": answer})
        return True

    def give_up(self, error: BaseException) -> NoReturn:
        """End all ranks, because this one cannot go on."""
        why = f"{self._name}: {error or type(error).__name__}"
        self._link.send({"do": "lost", "why": why})
        die(why)
        raise AssertionError("unreachable")

    def _give_way(self) -> None:
        """Give memory back that others need, also while rank 0 asks nothing."""
        for followed in self._models.values():
            followed.model.flash.pool.take_over()

    def _do(self, message: Message, load: Load) -> None:
        do, model = message["do"], self._models.get(message.get("model", -1))
        if do == "load":
            self._load(message, load)
        elif do == "timed":
            self.group.timed = message["on"]
        elif model is None:
            return  # "bye", or a model that was never loaded
        elif do == "unload":
            del self._models[message["model"]]
            model.model.flash.close()
            model.model.flash.machines = None  # else it lives on in a circle
        elif do == "call":
            model.call(message)
        elif do == "resize":
            flash = model.model.flash
            self.answer(lambda: flash.resize(message["memory"]))
        elif do == "stats":
            self.answer(model.stats)

    def _load(self, message: Message, load: Load) -> None:
        agreed: list[Message] = []

        def divide(parts: Assembled, facts: Facts) -> Assembled:
            self.answer(facts.to_json)
            agreed.append(self.next())
            if agreed[0]["do"] == "refuse":
                raise Refused
            shares, whole = agreed[0]["shares"], agreed[0]["whole"]
            one = self.group.of_rank_0 if agreed[0]["unlike"] else None
            return cut(parts, shares, self.group.rank, self.group.sum, whole, one)

        def work() -> None:
            options = LoadOptions(**message["options"])
            path = on_rank(message["path"], self.group.rank, self.group.size)
            loaded = load(path, message["memory"], options, divide)
            model = FollowedModel(loaded[0], self)
            loaded[0].flash.machines = model
            self._models[message["model"]] = model

        try:
            self.answer(work)
        except Refused:
            pass
        if not agreed:  # this rank could not say what it has: rank 0 knows why
            agreed.append(self.next())
        if agreed[0]["do"] == "refuse":
            print(f"Error: {agreed[0]['why']}", file=sys.stderr, flush=True)


class FollowedModel:
    """One model, as the other ranks have it: makes the calls that rank 0 makes."""

    def __init__(self, model: nn.Module, follower: Follower):
        self.model = model
        self._follower = follower
        self._copies = Copies()

    def call(self, message: Message) -> None:
        """Make a call, and compute all of it but the logits."""
        cache, group = None, self._follower.group
        group.settle()
        try:
            if "cache" in message:
                cache = self._copies.apply(message["cache"], group.copy)
            self.model(mx.array(message["tokens"]), cache=cache)
            if cache is not None:
                mx.eval([entry.state for entry in cache])
        except Refused:
            pass
        except BaseException as error:  # the others wait in a sum for ever
            self._follower.give_up(error)

    def __call__(
        self,
        model: nn.Module,
        inputs: mx.array,
        cache: Sequence[Any] | None,
        run: Callable[[int], mx.array],
    ) -> mx.array:
        """As `LedModel` has it, where rank 0 decides."""
        B, L = inputs.shape

        def room() -> int:
            return B * L if cache is None else model.flash.pool.prepare(B, L, cache)

        self._follower.answer(room)
        size = self._follower.next()["size"]
        if not size:
            raise Refused
        return run(size)

    def resize(self, memory: int | float | str) -> int | float | str:
        """Rank 0 has told this rank."""
        return memory

    def ranks(self, mine: Stats) -> list[RankReport]:
        """Nothing: rank 0 reports."""
        return []

    def close(self) -> None:
        """Nothing: rank 0 has told this rank."""

    def stats(self) -> dict[str, Any]:
        """What this rank has counted."""
        flash, group = self.model.flash, self._follower.group
        sums = {"sums": group.sums, "sum_bytes": group.sum_bytes, "sum_s": group.sum_s}
        peak = {"peak_bytes": mx.get_peak_memory(), "slots": list(flash.budget.slots)}
        return asdict(flash.stats) | sums | peak
