"""All slots of a model, which give way to what is needed at the moment.

Slots are a cache: they may be fewer for a while, for a long prompt or a long
conversation (`division`), or because other programs need memory (`elastic`).
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import FlashError
from ..memory_size import say_memory
from . import pressure
from .beside import more_beside
from .budget import Budget, bytes_of_slots, least_bytes, make_budget, total_bytes
from .caches import Caches
from .divide import Divide
from .division import Divider, Division, as_divided
from .footprint import LOGITS, Footprint
from .mlx_limits import LimitShare
from .slots import CLOSED, UnitSlots

CLOSER = 0.01  # of the budget: how near a shrunken one comes to the least that fits


class Pool:
    """The slots of all layers of a model, which is to be asked before every call.

    Those of the manifest's layers come first, then those of what is beside them.

    Attributes:
        budget: How memory is divided as a rule.
        division: How it is divided now.
        caches: All KV caches that live.
        resized: (time.perf_counter() of it, the new budget's bytes), in order.
        refused: (time.perf_counter() of it, the budget that was wanted, the one that
            was kept), where conversations left no room to shrink as far.
    """

    def __init__(
        self,
        budget: Budget,
        footprint: Footprint,
        layers: Sequence[UnitSlots],
        lock: AbstractContextManager,
        limits: LimitShare,
        folder: Path,
        divide: Divide | None = None,
    ):
        self.budget = budget
        self._limits = limits
        self._folder = folder
        self._footprint = as_divided(footprint, budget)
        self._layers: Sequence[UnitSlots] | None = layers
        self._lock = lock
        self._divide = divide
        self.caches = Caches()
        self.division = Division(
            budget.slots, budget.prefill_tokens, budget.kv_bytes, budget.beside_slots
        )
        self._rest = self.division  # where nothing has to give way
        self._given_bytes = budget.total_bytes  # by whoever uses the model
        self._wanted_bytes: int | None = None
        self.resized: list[tuple[float, int]] = []
        self.refused: list[tuple[float, int, int]] = []

    @property
    def logits_pay(self) -> bool:
        """Whether a chunk's logits should be computed before the next chunk."""
        return self._footprint.logits_pay

    @property
    def least_bytes(self) -> int:
        """About the smallest budget that works from now on."""
        return self._least_between(
            least_bytes(self._footprint) - 1, self.budget.total_bytes, 0
        )

    def bytes_of(self, memory: int | float | str) -> int:
        """An amount of memory as `load` takes it, in bytes."""
        return total_bytes(memory, self._footprint)

    def want(self, total_bytes: int | None) -> int | None:
        """Have another budget from the next call on; any thread may ask for it.

        Args:
            total_bytes: The budget; None leaves it as it is.

        Returns:
            The budget that there is, in bytes. None if what was wanted before has not
            been looked at yet.
        """
        pending = self._wanted_bytes is not None
        if total_bytes is not None:
            self._wanted_bytes = total_bytes
        return None if pending else self.budget.total_bytes

    def take_over(self) -> None:
        """Have the budget that `want` was told, or the nearest to it that fits.

        Every call of the model begins so; who waits for the next one does it, too.
        """
        with self._lock:
            if self._layers is not None:
                self._take_over(lambda: self.caches.held_bytes)

    def _take_over(self, kv_bytes: Callable[[], int]) -> None:
        wanted, self._wanted_bytes = self._wanted_bytes, None
        if wanted is not None:
            self._have_near(wanted, self.budget.total_bytes, kv_bytes)

    def resize(self, total_bytes: int) -> None:
        """Have another budget from now on. Contents that fit stay.

        Raises:
            NotEnoughMemory: If the least number of slots does not fit.
            FlashError: If the KV caches that there are do not fit.
        """
        with self._lock:
            if self._layers is None:
                raise FlashError(CLOSED)
            self._have(total_bytes, self.caches.held_bytes)
            self._given_bytes = total_bytes

    def hold_logits(self, tokens: int) -> None:
        """Have slots give way to the logits of so many tokens of a call, from now on.

        Raises:
            FlashError: If there is no room for them.
        """
        with self._lock:
            # Besides those that a call gives, log probabilities and what they are of.
            footprint = replace(self._footprint, logits=tokens + LOGITS - 1)
            if footprint == self._footprint:
                return
            rest = Divider(self.budget, footprint, self._divide).best(1, 0)
            if rest is None:
                raise FlashError(
                    f"The logits of {tokens} tokens need "
                    f"{footprint.logits_bytes / 1e6:,.1f} MB, which a budget of "
                    f"{say_memory(self.budget.total_bytes)} does not have. Draft fewer "
                    "tokens, or give more --memory."
                )
            self._footprint, self._rest = footprint, rest
            # What is beyond that is given when the model is called.
            self.division = replace(self.division, tokens=0)

    def _planned(
        self, total_bytes: int, kv_bytes: int
    ) -> tuple[Budget, Division, Division]:
        """A budget, its division at rest, and beside so much KV cache.

        Raises:
            NotEnoughMemory: If the least number of slots does not fit.
            FlashError: If the KV cache does not fit.
        """
        footprint = self._footprint
        budget = make_budget(total_bytes, footprint, self._folder, self._divide)
        # FFNs go on multiplying as many tokens at once as before.
        budget = replace(budget, batch_tokens=self.budget.batch_tokens)
        divider = Divider(budget, footprint, self._divide)
        return budget, self._best(divider, 1, 0), self._best(divider, 1, kv_bytes)

    def _have(self, total_bytes: int, kv_bytes: int) -> None:
        """Have another budget, with room for so much KV cache; as `_planned` raises."""
        budget, rest, division = self._planned(total_bytes, kv_bytes)
        before_bytes = self.budget.total_bytes
        beside = self._limits.total_bytes - before_bytes  # a draft model
        self._limits.change(total_bytes + beside, budget.cache_bytes)
        self.budget, self._rest = budget, rest
        self._change(division)
        if total_bytes != before_bytes:
            self.resized.append((time.perf_counter(), total_bytes))

    def _have_near(self, wanted: int, most: int, kv_bytes: Callable[[], int]) -> None:
        """Have the budget that is wanted, or the nearest to it that fits.

        Args:
            wanted, most: Bytes.
            kv_bytes: Says what KV caches will take.

        Raises:
            FlashError: If not even `most` is enough.
        """
        while True:
            try:
                return self._have(wanted, kv_bytes())
            except FlashError:
                if not self.caches.let_go():
                    break
        enough = self._least_between(wanted, most, kv_bytes())
        if enough != self.budget.total_bytes:
            self._have(enough, kv_bytes())
        refusal = wanted, enough
        known = self.refused and self.refused[-1][1:] == refusal
        if enough != wanted and not known:
            self.refused.append((time.perf_counter(), *refusal))

    def _least_between(self, too_little: int, enough: int, kv_bytes: int) -> int:
        """About the smallest budget that has room for so much KV cache."""
        while enough - too_little > CLOSER * enough:
            middle = (too_little + enough) // 2
            try:
                self._planned(middle, kv_bytes)
            except FlashError:
                too_little = middle
            else:
                enough = middle
        return enough

    def prepare(self, sequences: int, tokens: int, cache: Sequence[Any]) -> int:
        """Make room for a call of the model, and say how long its chunks may be.

        Args:
            sequences, tokens: Of the call; so many tokens of each sequence.
            cache: mlx-lm's caches that the call will add to.

        Returns:
            Tokens of a chunk, all sequences together. A call of more has to be cut.

        Raises:
            FlashError: If the KV cache leaves no room for the least number of slots, or
                if the model was closed.
        """
        with self._lock:
            if self._layers is None:
                raise FlashError(CLOSED)
            shapes = self._footprint.shapes
            grown = sequences, tokens, cache, shapes.kv_bytes_per_token
            needed = partial(self.caches.bytes_after, *grown)
            self._take_over(needed)
            try:
                self._prepare(sequences * tokens, needed())
            except FlashError:  # it may have given too much to others
                self._have_near(self.budget.total_bytes, self._given_bytes, needed)
                self._prepare(sequences * tokens, needed())
            return self.division.tokens

    def _prepare(self, tokens: int, kv_bytes: int) -> None:
        """Divide anew where that is of use; FlashError where there is no way."""
        now, usual = self.division, self.budget
        fits = tokens <= now.tokens and kv_bytes <= now.kv_bytes
        enough = tokens <= usual.prefill_tokens and kv_bytes <= usual.kv_bytes
        given_way = now.all_slots != self._rest.all_slots
        if not fits or (given_way and enough):
            divider = Divider(usual, self._footprint, self._divide)
            self._change(self._best(divider, tokens, kv_bytes))

    def close(self) -> None:
        """Let go of the slots, and refuse further calls."""
        with self._lock:
            self._layers = None

    def _best(self, divider: Divider, tokens: int, kv_bytes: int) -> Division:
        """The best division.

        Raises:
            FlashError: If there is none.
        """
        division = divider.best(tokens, kv_bytes)
        if division is None:
            raise FlashError(
                f"The conversations need {kv_bytes / 1e6:,.1f} MB of KV cache, which a "
                f"budget of {say_memory(divider.budget.total_bytes)} does not have "
                "beside the weights. Begin a new conversation, or give more --memory."
            )
        return division

    def _change(self, division: Division) -> None:
        """Have the slots of `division`: layers that shrink first, then the others.

        If something stops it, the next call of the model tries again.
        """
        assert self._layers is not None
        if division == self.division:
            return
        budget, footprint = self.budget, self._footprint
        kv_bytes = max(division.kv_bytes, self.division.kv_bytes)
        weights = footprint.fixed_bytes - footprint.kv_bytes
        room = budget.total_bytes - weights - kv_bytes
        self.division = replace(division, tokens=0)
        slots = [layer.n_slots for layer in self._layers]
        ffns = len(division.slots)
        wanted = division.all_slots
        order = sorted(range(len(slots)), key=lambda i: wanted[i] - slots[i])
        for i in order:
            slots[i] = wanted[i]
            spare = room - bytes_of_slots(slots[:ffns], footprint)
            spare -= more_beside(footprint.manifest, slots[ffns:])
            # Others may need memory just now: a resize must not make that worse.
            spare = min(spare, pressure.available_bytes() // 2)
            self._layers[i].resize(slots[i], max(spare, 0))
        mx.clear_cache()
        self.division = division
