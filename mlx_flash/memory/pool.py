"""All slots of a model, and how they give way to what is needed at the moment.

Slots are a cache: they may be fewer for a while. A long prompt is read in chunks, and
every chunk has every unit read that memory does not hold; so a longer chunk is worth
some slots. A conversation that outgrows the reserve for its KV cache takes them, too.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import mlx.core as mx

from ..errors import FlashError
from ..memory_size import say_memory
from . import pressure
from .budget import (
    Budget,
    bytes_of_slots,
    least_bytes,
    make_budget,
    share_slots,
    total_bytes,
)
from .divide import Divide
from .footprint import KV_STEP, MAX_PREFILL, Footprint
from .mlx_limits import LimitShare
from .slots import CLOSED, UnitSlots

KV_AHEAD = 256  # tokens


@dataclass(frozen=True)
class Division:
    """Slots of each layer beside chunks of so many tokens and so much KV cache."""

    slots: tuple[int, ...]
    tokens: int
    kv_bytes: int


class Pool:
    """The slots of all layers of a model, which is to be asked before every call.

    Attributes:
        budget: How memory is divided as a rule.
        division: How it is divided now.
        resized: (time.perf_counter() of it, the new budget's bytes), in order.
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
        units = [layer.units for layer in footprint.manifest.layers]
        share = max(n / m for n, m in zip(budget.slots, units, strict=True))
        self._footprint = replace(footprint, context=budget.context, share=share)
        self._layers: Sequence[UnitSlots] | None = layers
        self._lock = lock
        self._divide = divide
        # Everything that ever had keys and values of this model and still lives.
        self._caches: WeakSet[Any] = WeakSet()
        self.division = Division(budget.slots, budget.prefill_tokens, budget.kv_bytes)
        self._wanted_bytes: int | None = None
        self.resized: list[tuple[float, int]] = []

    @property
    def logits_pay(self) -> bool:
        """Whether a chunk's logits should be computed before the next chunk."""
        return self._footprint.logits_pay

    @property
    def least_bytes(self) -> int:
        """The smallest budget that works."""
        return least_bytes(self._footprint)

    def bytes_of(self, memory: int | float | str) -> int:
        """An amount of memory as `load` takes it, in bytes."""
        return total_bytes(memory, self._footprint)

    def want(self, total_bytes: int | None) -> bool:
        """Have another budget from the next call on; any thread may ask for it.

        Args:
            total_bytes: The budget; None leaves it as it is.

        Returns:
            Whether what was wanted before is there.
        """
        done = self._wanted_bytes is None
        if total_bytes is not None:
            self._wanted_bytes = total_bytes
        return done

    def resize(self, total_bytes: int) -> None:
        """Have another budget from now on. Contents that fit stay.

        Raises:
            NotEnoughMemory: If the least number of slots does not fit.
            FlashError: If the KV caches that there are do not fit.
        """
        with self._lock:
            if self._layers is None:
                raise FlashError(CLOSED)
            before, footprint = self.budget, self._footprint
            budget = make_budget(total_bytes, footprint, self._folder, self._divide)
            # FFNs go on multiplying as many tokens at once as before.
            self.budget = replace(budget, batch_tokens=before.batch_tokens)
            held = sum(_nbytes(entry) for entry in self._caches)
            try:
                division = self._best_division(1, held)
            except FlashError:
                self.budget = before
                raise
            beside = self._limits.total_bytes - before.total_bytes  # a draft model
            self._limits.change(total_bytes + beside, self.budget.cache_bytes)
            self._change(division)
            self.resized.append((time.perf_counter(), total_bytes))

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
            if self._wanted_bytes is not None:
                wanted, self._wanted_bytes = self._wanted_bytes, None
                try:
                    self.resize(wanted)
                except FlashError:
                    pass  # what is there is needed: it stays
            step = max(KV_STEP // sequences, 8)
            for entry in cache:
                if getattr(entry, "step", 0) > step:
                    entry.step = step  # mlx-lm's 256 tokens may be a lot of memory
            self._caches.update(cache)
            kv_bytes = self._kv_bytes(sequences, tokens, step, cache)
            tokens *= sequences
            now, usual = self.division, self.budget
            fits = tokens <= now.tokens and kv_bytes <= now.kv_bytes
            gave = now.tokens > usual.prefill_tokens or now.kv_bytes > usual.kv_bytes
            enough = tokens <= usual.prefill_tokens and kv_bytes <= usual.kv_bytes
            if not fits or (gave and enough):
                self._change(self._best_division(tokens, kv_bytes))
            return self.division.tokens

    def close(self) -> None:
        """Let go of the slots, and refuse further calls."""
        with self._lock:
            self._layers = None

    def _kv_bytes(
        self, sequences: int, tokens: int, step: int, cache: Sequence[Any]
    ) -> int:
        """What all caches hold, and what a call will add to some of them."""
        held = sum(_nbytes(entry) for entry in self._caches)
        if not any(_is_full(entry, tokens) for entry in cache):
            return held
        grown = sequences * -(-tokens // step) * step
        return int(held + grown * self._footprint.shapes.kv_bytes_per_token)

    def _best_division(self, tokens: int, kv_bytes: int) -> Division:
        """The division with which a prompt of so many tokens reads the fewest bytes.

        Raises:
            FlashError: If there is none.
        """
        reserve = self.budget.kv_bytes
        # Some more than is needed now, so that not every step has slots give way.
        ahead = int(KV_AHEAD * self._footprint.shapes.kv_bytes_per_token)
        for kv in (kv_bytes + ahead, kv_bytes) if kv_bytes > reserve else (reserve,):
            chunks = -(-tokens // self.budget.prefill_tokens)
            sizes = [
                max(-(-tokens // count), self.budget.prefill_tokens)
                for count in range(-(-tokens // MAX_PREFILL), chunks + 1)
            ]
            possible = [x for size in sizes if (x := self._divided(size, kv, tokens))]
            if possible:
                return min(possible, key=lambda x: self._bytes_read(tokens, x))
        raise FlashError(
            f"The conversations need {kv_bytes / 1e6:,.1f} MB of KV cache, which a "
            f"budget of {say_memory(self.budget.total_bytes)} does not have beside the "
            "weights. Begin a new conversation, or give more --memory."
        )

    def _bytes_read(self, tokens: int, division: Division) -> int:
        """What a prompt has read, and once more what slots lose by it."""
        ffn_bytes = self._footprint.manifest.ffn_bytes
        missing = ffn_bytes - self._bytes(division.slots)
        usual = ffn_bytes - self._bytes(self.budget.slots)
        return -(-tokens // division.tokens) * missing + max(missing - usual, 0)

    def _divided(self, tokens: int, kv_bytes: int, of: int) -> Division | None:
        """The division for chunks of so many tokens `of` a call."""
        budget, footprint = self.budget, self._footprint
        waiting = of if of > tokens else 0
        batch = budget.batch_tokens
        workspace = footprint.workspace_bytes(tokens, batch, waiting)
        workspace += footprint.growth_bytes(kv_bytes - footprint.kv_bytes)
        fixed = footprint.fixed_bytes - footprint.kv_bytes + kv_bytes
        room = budget.total_bytes - fixed - workspace
        slots = share_slots(room, footprint, self._divide)
        if slots is None:
            return None
        usual = zip(slots, budget.slots, strict=True)
        return Division(tuple(min(pair) for pair in usual), tokens, kv_bytes)

    def _bytes(self, slots: Sequence[int]) -> int:
        layers = self._footprint.manifest.layers
        return sum(n * x.unit_bytes for n, x in zip(slots, layers, strict=True))

    def _change(self, division: Division) -> None:
        """Have the slots of `division`: layers that shrink first, then the others.

        If something stops it, the next call of the model tries again.
        """
        assert self._layers is not None
        budget, footprint = self.budget, self._footprint
        kv_bytes = max(division.kv_bytes, self.division.kv_bytes)
        weights = footprint.fixed_bytes - footprint.kv_bytes
        room = budget.total_bytes - weights - kv_bytes
        self.division = replace(division, tokens=0)
        slots = [layer.n_slots for layer in self._layers]
        order = sorted(range(len(slots)), key=lambda i: division.slots[i] - slots[i])
        for i in order:
            slots[i] = division.slots[i]
            spare = room - bytes_of_slots(slots, footprint)
            # Others may need memory just now: a resize must not make that worse.
            spare = min(spare, pressure.available_bytes() // 2)
            self._layers[i].resize(slots[i], max(spare, 0))
        mx.clear_cache()
        self.division = division


def _nbytes(entry: Any) -> int:
    """What one of mlx-lm's caches holds; some kinds do not tell."""
    try:
        return entry.nbytes
    except (AttributeError, NotImplementedError):
        return 0


def _is_full(entry: Any, tokens: int) -> bool:
    """Whether a cache has to grow for so many more tokens of each sequence."""
    keys = getattr(entry, "keys", None)
    if not isinstance(keys, mx.array):
        return True
    if keys.shape[-2] == getattr(entry, "max_size", None):
        return False  # it rotates
    used = entry._idx if hasattr(entry, "_idx") else entry.offset
    return used + tokens > keys.shape[-2]
