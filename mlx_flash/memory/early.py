"""Units that are read on a guess, before their layer asks for them."""

import time
from dataclasses import dataclass

import numpy as np

from ..errors import FlashError
from ..storage.identity import Identities
from ..storage.reader import Reader, Ticket
from .held import Held
from .stats import Stats


@dataclass(frozen=True)
class Early:
    """Units on their way into slots, for the next step of their layer."""

    units: np.ndarray
    slots: np.ndarray
    ticket: Ticket

    def finish(
        self,
        needed: np.ndarray,
        reader: Reader,
        held: Held,
        files: Identities,
        stats: Stats,
    ) -> None:
        """Wait until they are there, and count which of them are `needed`.

        Where a read fails, the slots are empty afterwards: whoever needs the units
        meets the failure again.
        """
        since = time.perf_counter()
        try:
            result = reader.wait(self.ticket)
            files.check()
        except FlashError:
            held.cache.forget(self.slots)
            held.clear(self.slots)
            return
        held.cache.arrived(self.slots)
        right = int(np.isin(self.units, needed, assume_unique=True).sum())
        stats.io_s += time.perf_counter() - since
        stats.count(result)
        stats.early += len(self.units)
        stats.early_right += right
        # They had to be read: `waves` will find them in memory all the same.
        stats.hits -= right
        stats.misses += right
