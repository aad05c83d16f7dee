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

from . import format
from .cache import Lru, SlotCache, Wave
from .errors import FlashError
from .reader import PAGE_BYTES, Extent, Reader
from .stats import Stats

PAGE = 16384
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
    start = -address % PAGE if spare else 0
    flat = raw[start : start + nbytes]
    array = flat.view(dtype).reshape(shape)
    mx.eval(flat, array)
    view = np.asarray(flat).reshape(shape[0], -1)
    if np.asarray(array.view(mx.uint8)).ctypes.data != view.ctypes.data:
        raise RuntimeError("this MLX copies where it used to share memory")
    return array, view


def spare_bytes(part_bytes: int) -> int:
    """What `allocate` takes beyond the slots of a part of this size."""
    return PAGE if part_bytes % PAGE_BYTES == 0 else 0


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
    ):
        self.cache = SlotCache(layer.units, n_slots, policy)
        self.parts: dict[str, mx.array] = {}
        self.in_use: mx.array | None = None
        self.listener: Callable[[np.ndarray, int], None] | None = None
        self.stats = stats
        self._reader = reader
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

    def fetch(self, units: np.ndarray, tokens: int = 1) -> Iterator[Wave]:
        """Yield waves of `units` (sorted, unique), each read and ready to multiply.

        The caller sets `in_use` to what it computed from a wave before it asks for
        the next one.

        Raises:
            FlashError: If a read fails. The slots it was meant for count as empty.
        """
        if self.listener is not None:
            self.listener(units, tokens)
        stats = self.stats
        waves = self.cache.waves(units, tokens)
        while True:
            begin = time.perf_counter()
            wave = next(waves, None)
            stats.cache_s += time.perf_counter() - begin
            if wave is None:
                return
            stats.hits += len(wave.units) - len(wave.missing)
            stats.misses += len(wave.missing)
            try:
                self._finish_use()
                if len(wave.missing):
                    self._read(wave)
            except BaseException:
                self.cache.forget(wave.missing_slots)
                raise
            yield wave

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

    def _read(self, wave: Wave) -> None:
        self._check_files()
        begin = time.perf_counter()
        ticket = self._reader.submit(self._source, wave.missing, wave.missing_slots)
        result = self._reader.wait(ticket)
        stats = self.stats
        stats.io_s += time.perf_counter() - begin
        stats.read_s += result.seconds
        stats.bytes_read += result.bytes_read
        stats.reads += result.reads
