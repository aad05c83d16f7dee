"""A disk that is slower than the one there is: SYNTHETIC, to imitate one per rank.

Ranks on one machine share its disk, where machines have one each. Reads stay what they
are; whoever waits for them is kept waiting until a disk of the given rate would have
brought them. It brings one batch after the other, from the time that each was asked
for.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np

from ...storage.base_reader import Reader, ReadResult, Ticket

Open = Callable[..., Reader]


class SlowReader:
    """A reader whose batches take at least as long as `bytes_per_s` allows.

    Args:
        reader: Reads in fact.
        clock, sleep: As `time` has them.
    """

    def __init__(
        self,
        reader: Reader,
        bytes_per_s: float,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._reader = reader
        self._rate = bytes_per_s
        self._clock, self._sleep = clock, sleep
        self._since: dict[int, float] = {}  # by the id of a batch's ticket
        self._free_s = 0.0  # when the disk has brought all that was waited for

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def submit(
        self, source: int, units: np.ndarray, slots: np.ndarray, guess: bool = False
    ) -> Ticket:
        """As `Reader.submit`, noting when."""
        ticket = self._reader.submit(source, units, slots, guess)
        self._since[id(ticket)] = self._clock()
        return ticket

    def wait(self, ticket: Ticket) -> ReadResult:
        """As `Reader.wait`, and until the slow disk would be done with the batch."""
        result = self._reader.wait(ticket)
        since = self._since.pop(id(ticket))
        start = max(since, self._free_s)
        self._free_s = start + result.bytes_read / self._rate
        left = self._free_s - self._clock()
        if left > 0:
            self._sleep(left)
        return replace(result, seconds=max(result.seconds, self._clock() - since))


def slowed(open_reader: Open, bytes_per_s: float) -> Open:
    """`open_reader` of slow readers."""

    def open_slow(*args: Any, **options: Any) -> Reader:
        reader = SlowReader(open_reader(*args, **options), bytes_per_s)
        return cast(Reader, reader)  # it has all that a reader has

    return open_slow
