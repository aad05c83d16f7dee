"""The reader in C (`_reader.c`): threads that never touch Python."""

import struct
from typing import Any

import numpy as np

from .base_reader import Reader
from .extents import Extent, Region
from .source import Source, address

try:
    from . import _reader  # type: ignore[attr-defined]  # built by setup.py
except ImportError:  # it is optional: there was no compiler
    _reader = None


class NativeReader(Reader):
    """Neighbours are merged into one read, and large parts are shared by threads."""

    native = True

    def __init__(self, threads: int, direct: bool, max_gap_bytes: int):
        super().__init__(direct)
        self._reader = _reader.create(threads, max_gap_bytes)
        self._stop_with(_reader.close, self._reader)

    def _register(self, source: Source) -> Any:
        extents = b""
        for extent, opened in zip(source.extents, source.opened, strict=True):
            place = _place(extent)
            facts = *opened, *place[:2], len(extent.parts), place[2]
            extents += struct.pack("=7q", *facts)
        return _reader.add_source(
            self._reader, extents, _parts(source), source.n_units, source.n_slots
        )

    def _move(self, registered: Any, source: Source) -> Any:
        _reader.move_source(self._reader, registered, _parts(source), source.n_slots)
        return registered

    def _submit(
        self, registered: Any, units: np.ndarray, slots: np.ndarray, guess: bool
    ) -> Any:
        where = address(units), address(slots), units.size
        return _reader.submit(self._reader, registered, *where, guess)

    def _wait(self, handle: Any) -> tuple:
        return _reader.wait(handle)

    def _drain(self) -> None:
        _reader.drain(self._reader)


def _place(extent: Region) -> tuple[int, int, int]:
    """(offset, stride, address of a table of offsets), 0 for what an extent lacks."""
    if isinstance(extent, Extent):
        return extent.offset, extent.stride, 0
    return 0, 0, address(extent.offsets)  # which the source keeps alive


def _parts(source: Source) -> bytes:
    """Every part of every extent, as C knows it."""
    return b"".join(
        struct.pack("=Q2q", address(source.slots[index]), offset, size)
        for extent in source.extents
        for index, offset, size in extent.parts
    )
