"""One layer's units in memory: slots that flash is read into and MLX multiplies from.

Each part of a unit has one preallocated MLX array `[n_slots, *shape]`. NumPy views of
the same memory are what the reader writes to, so nothing is staged or copied.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import numpy as np

from ..errors import FlashError
from ..storage.manifest import Layer
from ..storage.reader import Extent, Reader, Ticket
from .allocation import allocate
from .fence import Fence, begin, evaluate
from .policies import Lru
from .slot_cache import SlotCache, Wave
from .stats import Stats

CLOSED = "This model was closed. Load it again to use it."

Total = TypeVar("Total")
# Told of every step: the units it asks for, its tokens, the units it wants kept.
Listener = Callable[[np.ndarray, int, np.ndarray | None], None]


@dataclass(frozen=True)
class Early:
    """Units that are read on a guess, for the next step of their layer."""

    units: np.ndarray
    slots: np.ndarray
    ticket: Ticket


class UnitSlots:
    """The slots of one FFN.

    A step (`run`) owns everything between asking for units and having multiplied them:
    waves, reads, waiting, and that no slot is read into before it was used. Wherever an
    exception stops it, the next step finds out what arrived and goes on from there.

    Attributes:
        parts: The MLX array of each part, by name, `[n_slots, *shape]`.
        cache: The bookkeeping.
        listener: Told of every step, or None.
    """

    def __init__(
        self,
        layer: Layer,
        extents: Sequence[Extent],
        n_slots: int,
        policy: Lru,
        reader: Reader,
        fence: Fence,
        stats: Stats,
        apart: float = 0.0,
    ):
        self.cache = SlotCache(layer.units, n_slots, policy, apart)
        self.parts: dict[str, mx.array] = {}
        self.listener: Listener | None = None
        self.stats = stats
        self._views: list[np.ndarray] = []
        for part in layer.parts:
            array, view = allocate((n_slots, *part.shape), getattr(mx, part.dtype))
            self.parts[part.name] = array
            self._views.append(view)
        self._reader = reader
        self._fence = fence
        self._source = reader.add_source(extents, self._views, layer.units)
        self._files = {extent.path: _identity(extent.path) for extent in extents}
        self._early: Early | None = None
        self._in_step = False  # still True when a step begins: the last one stopped
        self._closed = False

    @property
    def units(self) -> int:
        return len(self.cache.slot_of)

    @property
    def n_slots(self) -> int:
        return len(self.cache.unit_of)

    @property
    def holds_all(self) -> bool:
        """Whether every unit has its own slot of the same number, for good."""
        return self.n_slots == self.units

    def read_all(self) -> None:
        """Fill slots that have room for every unit, unit i in slot i."""
        self.run(np.arange(self.units), lambda total, wave: None)
        if not np.array_equal(self.cache.unit_of, np.arange(self.units)):
            raise RuntimeError("units are not in the slots of their numbers")

    def run(
        self,
        units: np.ndarray,
        multiply: Callable[[Total | None, Wave], Total],
        tokens: int = 1,
        keep: np.ndarray | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Total | None:
        """Bring `units` in waves, and fold `multiply` over the waves.

        Args:
            units: int array of unit ids, sorted, unique.
            multiply: (total so far, None at first; a wave whose units are there) → the
                new total: an array or a list of arrays that holds everything computed
                from slots so far. The next wave is read meanwhile where slots allow it.
            tokens, keep: As `SlotCache.waves` takes them.
            meanwhile: Called once, when the first wave is there.

        Returns:
            The last total; None if no unit was asked for.

        Raises:
            FlashError: If a read fails, or a file changed since the model was loaded.
        """
        with self._fence.lock:
            if self._closed:
                raise FlashError(CLOSED)
            if self.listener is not None:
                self.listener(units, tokens, keep)
            self._begin_step()
            self._finish_early(units)
            waves = self.cache.waves(units, tokens, keep)
            total = self._fold(waves, multiply, meanwhile)
            self._fence.hold(total)
            self._in_step = False
            return total

    def _fold(
        self,
        waves: Iterator[Wave],
        multiply: Callable[[Total | None, Wave], Total],
        meanwhile: Callable[[], None] | None,
    ) -> Total | None:
        total: Total | None = None
        wave, ticket = self._submit_next(waves, total)
        while wave is not None:
            self._await(wave, ticket)
            if meanwhile is not None:
                meanwhile()
                meanwhile = None
            if wave.ahead:
                following = self._submit_next(waves, total)
                total = multiply(total, wave)
                begin(total)
            else:
                total = multiply(total, wave)
                following = self._submit_next(waves, total)
            wave, ticket = following
        return total

    def read_early(self, units: np.ndarray) -> None:
        """Begin to read what the next step will probably ask for.

        A wrong guess costs reads and slots, never correctness; so does a failed read,
        which is left to `run` to meet again.

        Args:
            units: int array of unit ids, sorted, unique.
        """
        with self._fence.lock:
            busy = self._early is not None or self._in_step
            if busy or self._closed or self.holds_all:
                return
            self._in_step = True
            self._fence.settle()
            since = time.perf_counter()
            missing, slots = self.cache.early(units.astype(np.intp, copy=False))
            self.stats.cache_s += time.perf_counter() - since
            if len(missing):
                ticket = self._reader.submit(self._source, missing, slots)
                self._early = Early(missing, slots, ticket)
            self._in_step = False

    def close(self) -> None:
        """Refuse further steps."""
        self._closed = True

    def _begin_step(self) -> None:
        """Resolve whatever an exception left of the last step."""
        if self._in_step:
            self._reader.drain()
            self._fence.settle()
            mx.synchronize()  # nobody holds what the last step had begun to compute
            self._early = None
            self._clear(self.cache.recover())
        self._in_step = True

    def _finish_early(self, units: np.ndarray) -> None:
        """Wait for what `read_early` began, and count what of it `units` needs."""
        if self._early is None:
            return
        early, stats = self._early, self.stats
        since = time.perf_counter()
        try:
            result = self._reader.wait(early.ticket)
            self._check_files()
        except FlashError:  # met again, and reported, if the units are needed
            self.cache.forget(early.slots)
            self._clear(early.slots)
            self._early = None
            return
        self.cache.arrived(early.slots)
        self._early = None
        right = int(np.isin(early.units, units, assume_unique=True).sum())
        stats.io_s += time.perf_counter() - since
        stats.count(result)
        stats.early += len(early.units)
        stats.early_right += right
        # They had to be read: `waves` will find them in memory all the same.
        stats.hits -= right
        stats.misses += right

    def _submit_next(
        self, waves: Iterator[Wave], total: object
    ) -> tuple[Wave | None, Ticket | None]:
        """The next wave, its reads under way; `total` was computed from slots."""
        stats = self.stats
        since = time.perf_counter()
        wave = next(waves, None)
        stats.cache_s += time.perf_counter() - since
        if wave is None:
            return None, None
        stats.hits += len(wave.units) - len(wave.missing)
        stats.misses += len(wave.missing)
        evaluate(total)  # also before a wave of hits: it would pile up in memory
        if not len(wave.missing):
            return wave, None
        self._fence.settle()
        since = time.perf_counter()
        ticket = self._reader.submit(self._source, wave.missing, wave.missing_slots)
        stats.io_s += time.perf_counter() - since
        return wave, ticket

    def _await(self, wave: Wave, ticket: Ticket | None) -> None:
        """Wait for a wave's reads. Nothing else makes a slot VALID."""
        if ticket is None:
            return
        since = time.perf_counter()
        result = self._reader.wait(ticket)
        self._check_files()
        self.cache.arrived(wave.missing_slots)
        self.stats.io_s += time.perf_counter() - since
        self.stats.count(result)

    def _clear(self, slots: np.ndarray) -> None:
        """Zero slots that hold no unit: parts of one might be infinite or no number.

        A layer may multiply all slots and drop what it did not want, and 0 times NaN
        is NaN.
        """
        for view in self._views:
            view[slots] = 0

    def _check_files(self) -> None:
        """Refuse what was read from a file that was written anew: it is another model.

        Asked after a read: whatever was written before it shows in the file's time.
        """
        for path, before in self._files.items():
            if _identity(path) != before:
                raise FlashError(
                    f"{path} changed while its model was in use. Load the model again."
                )


def _identity(path: Path) -> tuple[int, ...] | None:
    """Which file lies at a path, and in which state; None where there is none."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns
