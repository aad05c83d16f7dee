"""One layer's units in memory: slots that flash is read into and MLX multiplies from.

Each part of a unit has one preallocated MLX array `[n_slots, *shape]`. NumPy views of
the same memory are what the reader writes to, so nothing is staged or copied.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import FlashError
from ..storage import manifest as format
from ..storage.limits import LARGE_PAGE_BYTES, PAGE_BYTES
from ..storage.reader import Extent, Reader, Ticket
from .policies import Lru
from .slot_cache import SlotCache, Wave
from .stats import Stats

CLOSED = "This model was closed. Load it again to use it."


def allocate(shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, np.ndarray]:
    """An MLX array of zeros and a NumPy view of the same memory.

    Where direct I/O can read into its rows, the array begins on a page. MLX aligns to
    less: one page more is allocated, and the array is a view into it.

    Returns:
        The array, and uint8 `[shape[0], bytes of a row]` over the same bytes.
    """
    nbytes = prod(shape) * dtype.size
    spare = spare_bytes(nbytes // shape[0])
    raw = mx.zeros((nbytes + spare,), mx.uint8)
    mx.eval(raw)
    address = np.asarray(raw).__array_interface__["data"][0]
    start = -address % LARGE_PAGE_BYTES if spare else 0
    flat = raw[start : start + nbytes]
    array = flat.view(dtype).reshape(shape)
    mx.eval(flat, array)
    view = np.asarray(flat).reshape(shape[0], -1)
    if np.asarray(array.view(mx.uint8)).ctypes.data != view.ctypes.data:
        raise RuntimeError("this MLX copies where it used to share memory")
    return array, view


def spare_bytes(part_bytes: int) -> int:
    """What `allocate` takes beyond the slots of a part of this size."""
    return LARGE_PAGE_BYTES if part_bytes % PAGE_BYTES == 0 else 0


def _identity(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of the last change; None where there is no file."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns


class UnitSlots:
    """The slots of one FFN: asks the cache what is missing and has it read.

    Attributes:
        parts: The MLX array of each part, by name, `[n_slots, *shape]`.
        cache: The bookkeeping.
        in_use: What was last computed from the slots. It is evaluated before a slot is
            overwritten: MLX is lazy, and would otherwise read the new bytes.
        listener: Called with the units and tokens of every `fetch`, or None.
    """

    def __init__(
        self,
        layer: format.Layer,
        folder: Path,
        n_slots: int,
        policy: Lru,
        reader: Reader,
        stats: Stats,
        extents: list[Extent] | None = None,
        apart: float = 0.0,
    ):
        self.cache = SlotCache(layer.units, n_slots, policy, apart)
        self.parts: dict[str, mx.array] = {}
        self.in_use: mx.array | None = None
        self.listener: Callable | None = None  # given what `fetch` is given
        self.stats = stats
        self._reader = reader
        self._early: tuple[np.ndarray, np.ndarray, Ticket] | None = None
        views = []
        for part in layer.parts:
            array, view = allocate((n_slots, *part.shape), getattr(mx, part.dtype))
            self.parts[part.name] = array
            views.append(view)
        if extents is None:  # all parts of a unit side by side in the layer's file
            parts = tuple((i, p.offset, p.bytes) for i, p in enumerate(layer.parts))
            path = folder / layer.file
            extents = [Extent(path, layer.data_offset, layer.unit_bytes, parts)]
        self._source = reader.add_source(extents, views, layer.units)
        self._files = {extent.path: _identity(extent.path) for extent in extents}

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
        """Fill a store that has room for every unit, unit i in slot i."""
        for wave in self.fetch(np.arange(self.units, dtype=np.int32)):
            assert np.array_equal(wave.units, wave.slots)

    def fetch(
        self, units: np.ndarray, tokens: int = 1, keep: np.ndarray | None = None
    ) -> Iterator[Wave]:
        """Yield waves of `units` (sorted, unique), each read and ready to multiply.

        The caller sets `in_use` to what it computed from a wave before it asks for
        the next one, which is being read meanwhile where the slots allow it.

        Args:
            units, tokens, keep: As `SlotCache.waves` takes them.

        Raises:
            FlashError: If a read fails. The slots it was meant for count as empty.
        """
        if self.listener is not None:
            self.listener(units, tokens, keep)
        self._finish_early(units)
        waves = self.cache.waves(units, tokens, keep)
        wave, ticket = self._begin(waves)
        try:
            while wave is not None:
                now, due, wave, ticket = wave, ticket, None, None
                self._finish(now, due)
                if now.ahead:
                    wave, ticket = self._begin(waves)
                    yield now
                    if self.in_use is not None:
                        mx.async_eval(self.in_use)
                else:
                    yield now
                    wave, ticket = self._begin(waves)
        finally:
            if ticket is not None:  # nobody will ask for it any more
                self._finish(wave, ticket)

    def read_early(self, units: np.ndarray) -> None:
        """Begin to read what the next `fetch` will probably ask for.

        A wrong guess costs reads and slots, never correctness; so does a failed read,
        which is left to `fetch` to meet again.

        Args:
            units: int array of unit ids, sorted, unique.
        """
        if self._early is not None or self.holds_all:
            return
        self._finish_use()
        begin = time.perf_counter()
        missing, slots = self.cache.early(units.astype(np.intp, copy=False))
        self.stats.cache_s += time.perf_counter() - begin
        if len(missing):
            try:
                ticket = self._reader.submit(self._source, missing, slots)
            except BaseException:
                self.cache.forget(slots)
                raise
            self._early = missing, slots, ticket

    def _finish_early(self, units: np.ndarray) -> None:
        """Wait for what `read_early` began, and count what of it `units` needs."""
        if self._early is None:
            return
        (missing, slots, ticket), self._early = self._early, None
        begin, stats = time.perf_counter(), self.stats
        try:
            result = self._reader.wait(ticket)
        except FlashError:  # met again, and reported, if the units are needed
            self.cache.forget(slots)
            return
        except BaseException:
            self.cache.forget(slots)
            raise
        right = int(np.isin(missing, units, assume_unique=True).sum())
        stats.io_s += time.perf_counter() - begin
        stats.count(result)
        stats.early += len(missing)
        stats.early_right += right
        # They had to be read: `waves` will find them in memory all the same.
        stats.hits -= right
        stats.misses += right

    def _begin(self, waves: Iterator[Wave]) -> tuple[Wave | None, Ticket | None]:
        """The next wave, its reads under way."""
        stats = self.stats
        begin = time.perf_counter()
        wave = next(waves, None)
        stats.cache_s += time.perf_counter() - begin
        if wave is None:
            return None, None
        stats.hits += len(wave.units) - len(wave.missing)
        stats.misses += len(wave.missing)
        try:
            self._finish_use()
            if not len(wave.missing):
                return wave, None
            self._check_files()
            begin = time.perf_counter()
            ticket = self._reader.submit(self._source, wave.missing, wave.missing_slots)
            stats.io_s += time.perf_counter() - begin
            return wave, ticket
        except BaseException:
            self.cache.forget(wave.missing_slots)
            raise

    def _finish(self, wave: Wave, ticket: Ticket | None) -> None:
        """Wait for a wave's reads."""
        if ticket is None:
            return
        begin = time.perf_counter()
        try:
            result = self._reader.wait(ticket)
        except BaseException:
            self.cache.forget(wave.missing_slots)
            raise
        self.stats.io_s += time.perf_counter() - begin
        self.stats.count(result)

    def _finish_use(self) -> None:
        """Evaluate `in_use`, also before a wave of hits: its result takes the place."""
        if self.in_use is not None:
            mx.eval(self.in_use)
            self.in_use = None

    def _check_files(self) -> None:
        """A file that is written anew under a running model would mix two models."""
        for path, before in self._files.items():
            if _identity(path) != before:
                raise FlashError(
                    f"{path} changed while its model was in use. Load the model again."
                )
