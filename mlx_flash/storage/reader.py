"""Read many small units from flash at once, straight into the slots MLX computes on.

A source is one layer: where its units lie in files (extents) and the slot arrays they
go to, one array per part. A batch is a list of (unit, slot): every part of the unit
lands in row `slot` of that part's array. Submitting returns at once and waiting is a
call of its own, so that flash works while MLX computes.

Two readers plan and read alike: `CReader` (`_reader.c`, threads without Python) and
`PoolReader` (`_pool_reader.py`), for where the extension was not built.
"""

import os
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FlashError
from .direct_io import open_uncached
from .limits import PAGE_BYTES

try:
    from . import _reader
except ImportError:  # optional: there was no compiler
    _reader = None


@dataclass(frozen=True)
class Extent:
    """A run of one file in which units follow each other at a fixed stride."""

    path: str | Path
    offset: int  # of unit 0, in bytes
    stride: int  # bytes from one unit to the next
    parts: tuple[tuple[int, int, int], ...]  # (slots index, offset in unit, bytes)


@dataclass(frozen=True)
class ReadResult:
    """What one batch asked of the file system."""

    bytes_read: int  # alignment and gaps included
    reads: int
    seconds: float  # from submit to the last completion


@dataclass(frozen=True)
class Ticket:
    """A batch in flight, to be passed to `wait`."""

    source: "Source"
    handle: Any  # the reader's own


@dataclass(frozen=True)
class Source:
    """A layer as a reader keeps it: checked, files open, parts in file order."""

    extents: tuple[Extent, ...]
    files: tuple[tuple[int, int], ...]  # (file descriptor, alignment) of each extent
    slots: tuple[np.ndarray, ...]  # kept alive for as long as reads may write
    n_units: int
    n_slots: int


class Reader:
    """The half that both readers share: checks, files, errors, closing."""

    native: bool

    def __init__(self, direct: bool):
        self.direct = direct  # False once a file refuses direct I/O
        self._sources: list[tuple[Source, Any]] = []
        self._files: dict[str, tuple[int, int]] = {}

    def _close_with(self, stop, *args):
        # Also runs when the reader is dropped, and at exit: threads that still read
        # must end before the memory that they write to goes.
        self._close = weakref.finalize(
            self, _close, stop, args, self._sources, self._files
        )

    def add_source(
        self, extents: Sequence[Extent], slots: Sequence[np.ndarray], n_units: int
    ) -> int:
        """Register a layer, after checking that every read of it is possible.

        Args:
            extents: Where the units lie. Together they fill each slot array once.
            slots: One uint8 array [n_slots, part bytes] per part, C-contiguous.
            n_units: How many units each extent holds.

        Returns:
            The source's number, for `submit`.

        Raises:
            FlashError: A file is missing, unreadable or too short.
            ValueError: The extents or the arrays contradict each other.
        """
        self._check_open()
        slots = tuple(slots)
        n_slots = _check_slots(slots)
        extents = tuple(_check_extents(extents, slots, n_units))
        files = tuple(self._open(extent, n_units) for extent in extents)
        source = Source(extents, files, slots, n_units, n_slots)
        self._sources.append((source, self._register(source)))
        return len(self._sources) - 1

    def submit(self, source: int, units: np.ndarray, slots: np.ndarray) -> Ticket:
        """Start to read units into slots, and return at once.

        Batches in flight together must not share slots: their order is not kept.

        Raises:
            ValueError: An id is out of range, a slot comes twice, the lengths differ.
        """
        self._check_open()
        if not 0 <= source < len(self._sources):
            raise ValueError(f"source {source} is not in [0, {len(self._sources)})")
        units, slots = _ids("units", units), _ids("slots", slots)
        if units.size != slots.size:
            raise ValueError(f"{units.size} units for {slots.size} slots")
        facts, registered = self._sources[source]
        return Ticket(facts, self._submit(registered, units, slots))

    def wait(self, ticket: Ticket) -> ReadResult:
        """Block until every read of the batch has ended, also when one fails.

        Raises:
            FlashError: A read failed or came short; the batch's slots are lost.
        """
        self._check_open()
        *result, error, index, offset, asked, got = self._wait(ticket.handle)
        if not error:
            return ReadResult(*result)
        reason = os.strerror(error) + "; the disk or the file is damaged"
        if error < 0:  # no errno: the file ended
            reason = f"only {got:,} bytes are there; the file was cut short"
        raise FlashError(
            f"{ticket.source.extents[index].path}: read of {asked} bytes at offset "
            f"{offset} failed: {reason}, check it with: mlx-flash verify"
        )

    def close(self):
        """Wait for what is in flight, end the threads, close the files."""
        self._close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def _check_open(self):
        if not self._close.alive:
            raise ValueError("the reader is closed")

    def _open(self, extent: Extent, n_units: int) -> tuple[int, int]:
        path = os.path.abspath(extent.path)
        try:
            if path not in self._files:
                fd, direct = open_uncached(path, self.direct)
                self._files[path] = fd, PAGE_BYTES if direct else 1
                self.direct &= direct
            have = os.fstat(self._files[path][0]).st_size
        except OSError as error:
            raise FlashError(
                f"{extent.path} cannot be read: {error.strerror}. "
                "Check the path, or convert the model again: mlx-flash convert"
            ) from error
        _, last, size = extent.parts[-1]
        need = extent.offset + (n_units - 1) * extent.stride + last + size
        if have < need:
            raise FlashError(
                f"{extent.path} has {have:,} of {need:,} bytes. "
                "Convert or download it again: mlx-flash convert"
            )
        return self._files[path]

    def _register(self, source: Source) -> Any:
        raise NotImplementedError

    def _submit(self, registered: Any, units: np.ndarray, slots: np.ndarray) -> Any:
        raise NotImplementedError

    def _wait(self, handle: Any) -> tuple:
        """(bytes, reads, seconds, error, extent, offset, bytes asked, bytes got)"""
        raise NotImplementedError


class CReader(Reader):
    native = True

    def __init__(self, threads: int, direct: bool, max_gap_bytes: int):
        super().__init__(direct)
        self._reader = _reader.create(threads, max_gap_bytes)
        self._close_with(_reader.close, self._reader)

    def _register(self, source):
        extents, parts = b"", b""
        for extent, file in zip(source.extents, source.files, strict=True):
            facts = *file, extent.offset, extent.stride, len(extent.parts)
            extents += struct.pack("=5q", *facts)
            for index, offset, size in extent.parts:
                rows = _address(source.slots[index])
                parts += struct.pack("=Q2q", rows, offset, size)
        return _reader.add_source(
            self._reader, extents, parts, source.n_units, source.n_slots
        )

    def _submit(self, registered, units, slots):
        addresses = _address(units), _address(slots)
        return _reader.submit(self._reader, registered, *addresses, units.size)

    def _wait(self, handle):
        return _reader.wait(handle)


def open_reader(
    threads: int = 32,
    *,
    direct: bool = True,
    native: bool | None = None,
    max_gap_bytes: int = 0,
) -> Reader:
    """Start the threads that read.

    Args:
        threads: How many reads are in flight at once.
        direct: Read around the page cache where the file system can.
        native: True for the C reader or an error, False for Python's, None for
            the best there is.
        max_gap_bytes: Merge two reads when no more than this lies between them.
    """
    if not 1 <= threads <= 1024:
        raise ValueError(f"{threads} threads are not in [1, 1024]")
    if max_gap_bytes < 0:
        raise ValueError(f"a gap of {max_gap_bytes} bytes is less than none")
    if native and _reader is None:
        raise FlashError(
            "The C reader is not built. With a C compiler at hand, install again: "
            "pip install --force-reinstall --no-binary :all: --no-deps "
            "mlx-llm-in-a-flash"
        )
    if native is False or _reader is None:
        from .python_reader import PoolReader

        return PoolReader(threads, direct, max_gap_bytes)
    try:
        return CReader(threads, direct, max_gap_bytes)
    except OSError as error:
        raise FlashError(
            f"{threads} reader threads cannot be started: {error.strerror}. Try fewer."
        ) from error


def _close(stop, args, sources, files):
    flights = stop(*args) or []
    sources.clear()

    def close_files(_=None):
        if all(flight.done() for flight in flights):
            while files:
                os.close(files.popitem()[1][0])

    close_files()
    for flight in flights:  # the last to end closes the files it read
        flight.add_done_callback(close_files)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _ids(name: str, ids: np.ndarray) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{name} are {ids.dtype} {ids.shape}, not a list of integers")
    return np.ascontiguousarray(ids, np.int64)


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


def _check_extents(extents, slots, n_units):
    """Yield the extents with their parts in file order."""
    if n_units < 1:
        raise ValueError(f"{n_units} units")
    filled = sorted(part[0] for extent in extents for part in extent.parts)
    if filled != list(range(len(slots))) or not filled:
        raise ValueError(f"the parts fill slots {filled}, there are {len(slots)}")
    for extent in extents:
        parts = sorted(extent.parts, key=lambda part: part[1])
        end = 0
        for index, offset, size in parts:
            row = slots[index].shape[1]
            if size != row:
                raise ValueError(f"a part of {size} bytes for slots of {row}")
            if offset < end:
                raise ValueError(f"the part at {offset} starts before byte {end}")
            end = offset + size
        if not parts or extent.offset < 0 or end > extent.stride:
            raise ValueError(f"parts of {end} bytes do not fit: {extent}")
        yield Extent(extent.path, extent.offset, extent.stride, tuple(parts))
