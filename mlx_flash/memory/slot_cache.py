"""Which unit is in which slot: one layer's bookkeeping, with no memory of its own.

A slot is never moved and never cleared: a unit that fell out of use stays valid until
its slot is wanted for another one. (The paper moves rows to keep the used ones
together; here the multiplication names the slots it wants, so nothing has to move.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .policies import EMPTY, Lru


@dataclass(frozen=True)
class Wave:
    """Units that are in memory together once `missing` were read into their slots.

    `units[i]` is in slot `slots[i]`; `missing` and `missing_slots` are the pairs that
    have to be read first. With `ahead`, the next wave takes none of these slots: it may
    be read while this one is multiplied.
    """

    units: np.ndarray
    slots: np.ndarray
    missing: np.ndarray
    missing_slots: np.ndarray
    ahead: bool = False


class SlotCache:
    """The slots of one layer.

    Args:
        units: How many units the layer has.
        slots: How many of them memory can hold, at least one.
        policy: `Lru()`, `Window(tokens)`, `Lrfu(half_life)`, or another class of
            theirs. Each cache takes its own from `policy.for_layer`.
        apart: Where a step needs at most this share of the slots, what is present and
            what is missing come as two waves, so that one is multiplied while the
            other is read.
    """

    def __init__(self, units: int, slots: int, policy: Lru, apart: float = 0.0):
        if not 1 <= slots <= units:
            raise ValueError(f"{slots} slots for {units} units")
        self.policy, self.apart = policy.for_layer(units), apart
        # Indices of the machine's own width: NumPy converts any other on every use.
        self.slot_of = np.full(units, EMPTY, np.intp)
        self.unit_of = np.full(slots, EMPTY, np.intp)
        # One more than slots, so that marking slot EMPTY marks nothing.
        self._marks = np.full(slots + 1, -1, np.int64)
        self.last_used = self._marks[:-1]
        self.now = 0  # tokens seen

    def waves(
        self, units: np.ndarray, tokens: int = 1, keep: np.ndarray | None = None
    ) -> Iterator[Wave]:
        """Bring `units` (sorted, unique) into slots, in as many waves as they need.

        A wave's units count as present from the moment it is yielded: whoever fails to
        read them must `forget` their slots. When a wave is asked for, all waves but the
        last one must have been multiplied (that one too, if it was not `ahead`).

        Args:
            units: int array of unit ids.
            tokens: How many tokens this step brings, for policies that count them.
            keep: Those of `units` to leave in memory if there are several waves, which
                otherwise leaves what came last.
        """
        self.now += tokens
        self.policy.expire(self)
        units = units.astype(np.intp, copy=False)
        self.policy.use(self, units)
        slots = self.slot_of[units]
        self._marks[slots] = self.now  # what this step needs is not evicted
        absent = np.flatnonzero(slots == EMPTY)
        missing = units[absent]
        room = len(self.unit_of) - len(units) + len(missing)
        if len(missing) > room:
            yield from self._sweep(units, slots, keep)
        elif 0 < len(missing) < len(units) <= self.apart * len(self.unit_of):
            taken, none = self._assign(missing), missing[:0]
            present = slots != EMPTY
            yield Wave(units[present], slots[present], none, none, ahead=True)
            yield Wave(missing, taken, missing, taken)
        else:
            taken = slots[absent] = self._assign(missing)
            yield Wave(units, slots, missing, taken)

    def _sweep(self, units: np.ndarray, slots: np.ndarray, keep) -> Iterator[Wave]:
        """What is present, then what is missing, half of the slots at a time.

        While one half is multiplied the other is read. Units to keep stay where they
        are, or where they are read to, and the halves share what is left.
        """
        kept = np.zeros(len(self.slot_of), bool)
        if keep is not None:
            kept[keep[: len(self.unit_of) // 2]] = True
        room = len(self.unit_of) - int(np.count_nonzero(kept))
        size, ahead = max(room // 2, 1), room > 1
        present = slots != EMPTY
        missing, hits, hit_slots = units[~present], units[present], slots[present]
        pinned = np.zeros(len(self.unit_of), bool)
        pinned[hit_slots[kept[hits]]] = True
        none = taken = missing[:0]
        for start in range(0, len(hits), size):
            taken = hit_slots[start : start + size]
            yield Wave(hits[start : start + size], taken, none, none, ahead)
        for start in range(0, len(missing), size):
            brought = missing[start : start + size]
            blocked = pinned.copy()
            blocked[taken if ahead else none] = True
            taken = self._assign(brought, blocked)
            pinned[taken[kept[brought]]] = True
            yield Wave(brought, taken, brought, taken, ahead)
        if keep is not None:  # what only passed through goes first
            self.last_used[(self.last_used == self.now) & ~pinned] = self.now - 1

    def early(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make room for units that the next step will probably need.

        Those of them that are there are not given up for it, nor is more than half of
        all slots: what the next step really needs is often older.

        Returns:
            The units to read, and the slots they count as being in from now on.
        """
        slots = self.slot_of[units]
        self._marks[slots] = self.now
        missing = units[slots == EMPTY][: len(self.unit_of) // 2]
        return missing, self._assign(missing)

    def forget(self, slots: np.ndarray) -> None:
        """Take back what `slots` are said to hold."""
        self.slot_of[self.unit_of[slots]] = EMPTY
        self.unit_of[slots] = EMPTY
        self.last_used[slots] = -1

    def _assign(
        self, units: np.ndarray, blocked: np.ndarray | None = None
    ) -> np.ndarray:
        """Slots for `units`: the longest unused of those that are not `blocked`."""
        count = len(units)
        if count == 0:
            return units
        ranks, free = self.policy.ranks(self), None
        if blocked is not None:
            free = np.flatnonzero(~blocked)
            ranks = ranks[free]
        if count < len(ranks):
            slots = np.argpartition(ranks, count)[:count]
        else:
            slots = np.arange(count)
        if free is not None:
            slots = free[slots]
        # Sorted, so that neighbouring units tend to land in neighbouring slots.
        slots.sort()
        old = self.unit_of[slots]
        self.slot_of[old[old != EMPTY]] = EMPTY
        self.slot_of[units] = slots
        self.unit_of[slots] = units
        self.last_used[slots] = self.now
        return slots
