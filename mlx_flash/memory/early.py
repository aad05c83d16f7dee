"""Units that are read on a guess, before their layer asks for them.

What the layer needs is not kept waiting for what was guessed wrongly: its own reads are
submitted first, and go first. So guessed slots stay READING until something needs them,
or the step is over.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from ..errors import FlashError
from ..storage.identity import Identities
from ..storage.reader import Reader, Ticket
from .held import Held
from .slot_cache import SlotCache
from .stats import Stats


@dataclass(frozen=True)
class Early:
    """Units on their way into slots, for the next step of their layer.

    Attributes:
        needed: Which of them that step asks for; None before it began.
    """

    units: np.ndarray
    slots: np.ndarray
    ticket: Ticket
    needed: np.ndarray | None = None

    def uses(self, slots: np.ndarray) -> bool:
        """Whether some of `slots` are read into."""
        return bool(np.isin(self.slots, slots).any())

    def counted(self, asked: np.ndarray, stats: Stats) -> Early:
        """The same, where a step asks for units, which is counted."""
        needed = np.isin(self.units, asked, assume_unique=True)
        right = int(needed.sum())
        stats.early += len(self.units)
        stats.early_right += right
        # They had to be read: `waves` will find that they have slots all the same.
        stats.hits -= right
        stats.misses += right
        return replace(self, needed=needed)

    def finish(
        self,
        reader: Reader,
        source: int,
        held: Held,
        files: Identities,
        stats: Stats,
    ) -> None:
        """Wait until they are there.

        A slot that was given to another unit meanwhile holds nothing. Where a read
        fails, what the step needs is read again; the other slots are empty.

        Raises:
            FlashError: If that fails, too, or a file changed.
        """
        since = time.perf_counter()
        cache = held.cache
        mine = cache.unit_of[self.slots] == self.units
        try:
            result = reader.wait(self.ticket)
        except FlashError:
            needed = mine if self.needed is None else mine & self.needed
            lost = self.slots[mine & ~needed]
            cache.forget(lost)
            held.clear(lost)
            if not needed.any():
                return
            units, slots = self.units[needed], self.slots[needed]
            result = reader.wait(reader.submit(source, units, slots))
            mine = needed
        files.check()
        cache.arrived(self.slots[mine])
        stats.count(result)
        stats.io_s += time.perf_counter() - since


def begin_early(
    units: np.ndarray,
    likely: np.ndarray | None,
    cache: SlotCache,
    reader: Reader,
    source: int,
    stats: Stats,
) -> Early | None:
    """Begin to read those of `units` that are not in slots; None if all are.

    `likely` is as `UnitSlots.read_early` takes it.
    """
    since = time.perf_counter()
    missing, slots = cache.early(units.astype(np.intp, copy=False), likely)
    stats.cache_s += time.perf_counter() - since
    if not len(missing):
        return None
    ticket = reader.submit(source, missing, slots, guess=True)
    return Early(missing, slots, ticket)
