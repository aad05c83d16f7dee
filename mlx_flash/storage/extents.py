"""Where a layer's units lie: at a fixed stride, or each part of each at its own place.

Flash folders, and checkpoints as mlx-lm saves them, have strides. Checkpoints with a
tensor for every expert and projection have places, which may be in several files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .manifest import Layer

ABSENT = -1  # in a table of offsets: this part of this unit lies in another file


@dataclass(frozen=True)
class Extent:
    """A run of one file in which units follow each other at a fixed stride.

    Attributes:
        path: The file.
        offset: Of unit 0, in bytes.
        stride: Bytes from one unit to the next.
        parts: (slot array, offset in the unit, bytes) of each part.
    """

    path: Path
    offset: int
    stride: int
    parts: tuple[tuple[int, int, int], ...]

    def end(self, n_units: int) -> int:
        """Where the last of so many units ends in the file."""
        _, last, size = self.parts[-1]
        return self.offset + (n_units - 1) * self.stride + last + size


@dataclass(frozen=True, eq=False)
class Places:
    """Parts of units that lie anywhere in one file.

    Attributes:
        path: The file.
        parts: (slot array, 0, bytes) of each part.
        offsets: int64 [units, parts], of the first byte of each in the file; ABSENT
            where it lies in another one.
    """

    path: Path
    parts: tuple[tuple[int, int, int], ...]
    offsets: np.ndarray

    def end(self, n_units: int) -> int:
        """Where the part that lies last in the file ends."""
        sizes = np.array([size for _, _, size in self.parts])
        there = self.offsets[:n_units]
        return int(np.where(there == ABSENT, 0, there + sizes).max())


Region = Extent | Places


def bundle_extent(layer: Layer, folder: Path) -> Extent:
    """A layer of a flash folder: all parts of a unit lie side by side in its file."""
    parts = tuple((i, part.offset, part.bytes) for i, part in enumerate(layer.parts))
    path = folder / layer.file
    return Extent(path, layer.data_offset, layer.unit_bytes, parts)


def check_extents(
    extents: Sequence[Region], row_bytes: Sequence[int], n_units: int
) -> Iterator[Region]:
    """The extents as readers want them: parts in file order, whole tables.

    Args:
        row_bytes: Of each slot array.
        n_units: The units that may be read, from 0 on.

    Raises:
        ValueError: If they contradict the slots or each other, or do not fill each
            array exactly once.
    """
    if n_units < 1:
        raise ValueError(f"{n_units} units")
    times = np.zeros((n_units, len(row_bytes)), np.int64)
    for extent in extents:
        for index, _, size in extent.parts:
            if not 0 <= index < len(row_bytes):
                raise ValueError(f"a part for slots {index} of {len(row_bytes)}")
            if size != row_bytes[index]:
                raise ValueError(
                    f"a part of {size} bytes for slots of {row_bytes[index]}"
                )
        if isinstance(extent, Extent):
            checked: Region = _in_order(extent)
            for index, _, _ in extent.parts:
                times[:, index] += 1
        else:
            checked = _whole_table(extent, n_units)
            for column, (index, _, _) in enumerate(extent.parts):
                times[:, index] += checked.offsets[:n_units, column] != ABSENT
        yield checked
    if not row_bytes:
        raise ValueError("no slots")
    for unit, index in np.argwhere(times != 1)[:1].tolist():
        raise ValueError(f"unit {unit} fills slots {index} {times[unit, index]} times")


def _in_order(extent: Extent) -> Extent:
    parts = sorted(extent.parts, key=lambda part: part[1])
    end = 0
    for _, offset, size in parts:
        if offset < end:
            raise ValueError(f"the part at {offset} starts before byte {end}")
        end = offset + size
    if not parts or extent.offset < 0 or end > extent.stride:
        raise ValueError(f"parts of {end} bytes do not fit: {extent}")
    return Extent(extent.path, extent.offset, extent.stride, tuple(parts))


def _whole_table(extent: Places, n_units: int) -> Places:
    offsets = np.ascontiguousarray(extent.offsets, np.int64)
    if offsets.ndim != 2 or offsets.shape[1] != len(extent.parts) or not extent.parts:
        raise ValueError(f"offsets {offsets.shape} of {len(extent.parts)} parts")
    if len(offsets) < n_units:
        raise ValueError(f"offsets of {len(offsets)} of {n_units} units")
    if (offsets < ABSENT).any():
        raise ValueError(f"an offset of {offsets.min()}")
    return Places(extent.path, extent.parts, offsets)
