"""Where a layer's units lie in files, and the arrays that they are read into."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import FlashError
from .direct_io import open_uncached
from .extents import Region, check_extents
from .limits import PAGE_BYTES, SCATTER_BYTES


class OpenFile(NamedTuple):
    """A file that reads are made on.

    Attributes:
        descriptor: The system's number of it.
        align: What direct reads want aligned, in bytes: offset, length and address. 1
            where reads go through the page cache.
        scatter: The same for each buffer of a read into several.
    """

    descriptor: int
    align: int
    scatter: int


class OpenFiles:
    """The descriptors of one reader. The last one who holds this closes them.

    Every read in flight holds it, so that no descriptor is closed, and its number given
    to another file, under a thread that still reads.

    Attributes:
        direct: False once a file refused direct I/O.
    """

    def __init__(self, direct: bool):
        self.direct = direct
        self._open: dict[str, OpenFile] = {}

    def open(self, path: Path) -> OpenFile:
        """The file, opened at most once."""
        name = os.path.abspath(path)
        if name not in self._open:
            fd, direct = open_uncached(name, self.direct)
            sizes = (PAGE_BYTES, SCATTER_BYTES) if direct else (1, 1)
            self._open[name] = OpenFile(fd, *sizes)
            self.direct &= direct
        return self._open[name]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1].descriptor)

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class Source:
    """A layer as a reader keeps it: checked, files open, parts in file order.

    Attributes:
        opened: The file of each extent.
        slots: The arrays, which must live for as long as reads may write to them.
        files: Keeps the descriptors open.
        stored: Which units of the files are read, by their numbers there; None for all.
    """

    extents: tuple[Region, ...]
    opened: tuple[OpenFile, ...]
    slots: tuple[np.ndarray, ...]
    n_units: int
    n_slots: int
    files: OpenFiles
    stored: np.ndarray | None = None


def make_source(
    extents: Sequence[Region],
    slots: Sequence[np.ndarray],
    n_units: int,
    files: OpenFiles,
    stored: np.ndarray | None = None,
) -> Source:
    """Check that every read of a layer is possible.

    Args:
        extents: Where the units lie. Together they fill each slot array once.
        slots: One uint8 array [n_slots, part bytes] per part, C-contiguous.
        n_units: How many units are read, from 0 on.
        files: Opens the extents' files.
        stored: The numbers that these units have in the extents, ascending; None where
            they are the same.

    Raises:
        FlashError: A file is missing, unreadable or too short.
        ValueError: The extents or the arrays contradict each other.
    """
    arrays = tuple(slots)
    n_slots = _check_slots(arrays)
    if stored is not None:
        if len(stored) != n_units or stored[0] < 0 or (np.diff(stored) < 1).any():
            raise ValueError(f"{n_units} units that are stored as {stored}")
        n_units = int(stored[-1]) + 1
    row_bytes = [array.shape[1] for array in arrays]
    checked = tuple(check_extents(extents, row_bytes, n_units))
    opened = tuple(_open(extent, n_units, files) for extent in checked)
    return Source(checked, opened, arrays, n_units, n_slots, files, stored)


def move_source(source: Source, slots: Sequence[np.ndarray]) -> Source:
    """The same layer with other slot arrays, of the same row sizes."""
    arrays = tuple(slots)
    if [a.shape[1:] for a in arrays] != [a.shape[1:] for a in source.slots]:
        raise ValueError("slots of another row size")
    return replace(source, slots=arrays, n_slots=_check_slots(arrays))


def address(array: np.ndarray) -> int:
    """Where an array's first byte lies in memory."""
    return array.__array_interface__["data"][0]


def _open(extent: Region, n_units: int, files: OpenFiles) -> OpenFile:
    try:
        opened = files.open(extent.path)
        have = os.fstat(opened.descriptor).st_size
    except OSError as error:
        raise FlashError(
            f"{extent.path} cannot be read: {error.strerror}. "
            "Check the path, or convert the model again: mlx-flash convert"
        ) from error
    need = extent.end(n_units)
    if have < need:
        raise FlashError(
            f"{extent.path} has {have:,} of {need:,} bytes. "
            "Convert or download it again: mlx-flash convert"
        )
    return opened


def _check_slots(slots: tuple[np.ndarray, ...]) -> int:
    for i, array in enumerate(slots):
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
            raise ValueError(f"slots {i} are not a NumPy array of uint8")
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"slots {i} have the shape {array.shape}, not 2-D")
        if not (array.flags.c_contiguous and array.flags.writeable):
            raise ValueError(f"slots {i} are not C-contiguous and writable")
        if len(array) != len(slots[0]):
            raise ValueError(f"slots {i} have {len(array)} rows, not {len(slots[0])}")
    return len(slots[0]) if slots else 0
