"""Read through the engine's own reader with the cache switched off.

What is read lands in one buffer and is overwritten by the next read: nothing stays, so
every token asks flash for everything it needs.
"""

import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..memory.allocation import allocate
from ..memory.policies import Lru, Slots
from ..memory.slot_cache import EMPTY
from ..memory.slots import UnitSlots
from ..memory.stats import Stats
from ..storage.extents import bundle_extent
from ..storage.limits import CHUNK_BYTES
from ..storage.manifest import Layer
from ..storage.reader import Extent, Reader

CHUNKS = 128  # the buffer for files that are read whole; 32 are in flight at once


class KeepNothing(Lru):
    """A cache policy under which a token finds nothing of the tokens before it."""

    def expire(self, cache: Slots) -> None:
        cache.forget(np.flatnonzero(cache.unit_of != EMPTY))


def bring(slots: UnitSlots, units: np.ndarray) -> None:
    """Bring units (sorted, unique) into a layer's slots, and multiply nothing."""
    slots.run(units, lambda total, wave: None)


class Landing:
    """Slots that belong to no layer: `reads` of any source go there."""

    def __init__(
        self, reader: Reader, part_bytes: list[int], n_slots: int, stats: Stats
    ):
        self.reader, self.n_slots, self.stats = reader, n_slots, stats
        arrays = [allocate((n_slots, size), mx.uint8) for size in part_bytes]
        self._keep = [array for array, _ in arrays]
        self.views = [view for _, view in arrays]
        self.nbytes = n_slots * sum(part_bytes)

    def add(self, extents: list[Extent], units: int) -> int:
        """A source that lands here; returns its number."""
        return self.reader.add_source(extents, self.views, units)

    def read(self, source: int, units: np.ndarray) -> None:
        """Read units of a source, as many at once as there is room for."""
        begin = time.perf_counter()
        for start in range(0, len(units), self.n_slots):
            batch = units[start : start + self.n_slots]
            ticket = self.reader.submit(source, batch, np.arange(len(batch)))
            result = self.reader.wait(ticket)
            self.stats.count(result)
        self.stats.io_s += time.perf_counter() - begin


class WholeFiles:
    """Files that are read from end to end, in long reads, for every token."""

    def __init__(self, reader: Reader, stats: Stats):
        self.chunks = Landing(reader, [CHUNK_BYTES], CHUNKS, stats)
        self.wanted: list[tuple[Landing, int, int]] = []  # (landing, source, units)

    def add(self, path: Path, limit_bytes: int | None = None) -> None:
        """Read `path` too, or its first `limit_bytes`."""
        size = path.stat().st_size
        size = size if limit_bytes is None else min(size, limit_bytes)
        count, rest = divmod(size, CHUNK_BYTES)
        if count:
            extent = Extent(path, 0, CHUNK_BYTES, ((0, 0, CHUNK_BYTES),))
            self.wanted.append((self.chunks, self.chunks.add([extent], count), count))
        if rest:
            tail = Landing(self.chunks.reader, [rest], 1, self.chunks.stats)
            extent = Extent(path, count * CHUNK_BYTES, rest, ((0, 0, rest),))
            self.wanted.append((tail, tail.add([extent], 1), 1))

    def read(self) -> None:
        for landing, source, units in self.wanted:
            landing.read(source, np.arange(units))


def unbundled(layer: Layer, folder: Path) -> list[Extent]:
    """A layer's file taken as if its parts lay apart: up rows, then down columns.

    Offsets, lengths and alignment are those that such a file would have, so reads cost
    what they would cost there. The bytes belong to other neurons: good for nothing but
    timing.
    """
    return [
        Extent(
            folder / layer.file,
            layer.data_offset + layer.units * part.offset,
            part.bytes,
            ((i, 0, part.bytes),),
        )
        for i, part in enumerate(layer.parts)
    ]


def bundled(layer: Layer, folder: Path) -> list[Extent]:
    """A layer's file as it is: one read brings all parts of a unit."""
    return [bundle_extent(layer, folder)]
