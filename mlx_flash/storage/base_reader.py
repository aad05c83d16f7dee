"""What both readers share: sources, batches, errors, closing.

A source is one layer: where its units lie in files and the slot arrays that they go
to, one array per part. A batch is a list of (unit, slot): every part of the unit lands
in row `slot` of that part's array. Submitting returns at once and waiting is a call of
its own, so that flash works while MLX computes.
"""

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import FlashError
from .extents import Region
from .source import OpenFiles, Source, make_source, move_source

SHORT_READ = -1  # beside the errnos: the file ends too early


@dataclass(frozen=True)
class ReadResult:
    """What one batch asked of the file system.

    Attributes:
        bytes_read: Alignment and gaps included.
        seconds: From `submit` to the last completion.
    """

    bytes_read: int
    reads: int
    seconds: float


@dataclass(frozen=True)
class Ticket:
    """A batch in flight, to be passed to `wait`; `handle` is the reader's own."""

    source: Source
    handle: Any


class Reader:
    """Reads batches of units into slots. `native` says whether threads are C's."""

    native: bool

    def __init__(self, direct: bool):
        self._sources: list[tuple[Source, Any]] = []
        self._files = OpenFiles(direct)

    def _stop_with(self, stop: Callable, *args: Any) -> None:
        # Also runs when the reader is dropped, and at exit: threads that still read
        # must end before the memory that they write to goes.
        self._stop = weakref.finalize(self, stop, *args)

    @property
    def direct(self) -> bool:
        """Whether reads go around the operating system's page cache."""
        return self._files.direct

    def add_source(
        self,
        extents: Sequence[Region],
        slots: Sequence[np.ndarray],
        n_units: int,
        stored: np.ndarray | None = None,
    ) -> int:
        """Register a layer; the arguments are those of `make_source`.

        Returns:
            The source's number, for `submit`.
        """
        self._check_open()
        source = make_source(extents, slots, n_units, self._files, stored)
        self._sources.append((source, self._register(source)))
        return len(self._sources) - 1

    def move_source(self, source: int, slots: Sequence[np.ndarray]) -> None:
        """Read into other arrays from now on, which may have more or fewer slots.

        What is in flight is waited for first.
        """
        self.drain()
        facts, registered = self._sources[source]
        moved = move_source(facts, slots)
        self._sources[source] = (moved, self._move(registered, moved))

    def submit(
        self, source: int, units: np.ndarray, slots: np.ndarray, guess: bool = False
    ) -> Ticket:
        """Start to read units into slots, and return at once.

        Batches in flight together must not share slots: their order is not kept.

        Args:
            guess: Nobody waits for these units yet: reads of other batches that were
                not begun go first.

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
        if facts.stored is not None:
            if units.size and not 0 <= units.min() <= units.max() < len(facts.stored):
                raise ValueError(f"a unit is not in [0, {len(facts.stored)})")
            units = _ids("units", facts.stored[units])
        return Ticket(facts, self._submit(registered, units, slots, guess))

    def wait(self, ticket: Ticket) -> ReadResult:
        """Block until every read of the batch has ended, also when one fails.

        Raises:
            FlashError: A read failed or came short; the batch's slots are lost.
        """
        self._check_open()
        *result, error, index, offset, asked, got = self._wait(ticket.handle)
        if not error:
            return ReadResult(*result)
        reason = f"only {got:,} bytes are there; the file was cut short"
        if error != SHORT_READ:
            reason = os.strerror(error) + "; the disk or the file is damaged"
        raise FlashError(
            f"{ticket.source.extents[index].path}: read of {asked} bytes at offset "
            f"{offset} failed: {reason}, check it with: mlx-flash verify"
        )

    def drain(self) -> None:
        """Block until nothing is in flight, also what nobody has a ticket of.

        After an exception between `submit` and `wait` this makes slots safe to reuse.
        """
        self._check_open()
        self._drain()

    def close(self) -> None:
        """Wait for what is in flight, end the threads, close the files."""
        self._stop()
        self._files.close()
        self._sources.clear()

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._stop.alive:
            raise ValueError("the reader is closed")

    def _register(self, source: Source) -> Any:
        raise NotImplementedError

    def _move(self, registered: Any, source: Source) -> Any:
        raise NotImplementedError

    def _submit(
        self, registered: Any, units: np.ndarray, slots: np.ndarray, guess: bool
    ) -> Any:
        raise NotImplementedError

    def _wait(self, handle: Any) -> tuple:
        """(bytes, reads, seconds, error, extent, offset, bytes asked, bytes got)"""
        raise NotImplementedError

    def _drain(self) -> None:
        raise NotImplementedError


def _ids(name: str, ids: np.ndarray) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{name} are {ids.dtype} {ids.shape}, not a list of integers")
    return np.ascontiguousarray(ids, np.int64)
