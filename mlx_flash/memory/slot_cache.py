"""Which unit is in which slot: one layer's bookkeeping, with no memory of its own.

A slot is EMPTY, READING (it was given to a unit whose bytes are under way) or VALID
(`valid`), and only `arrived` makes it VALID. It is never moved and never cleared: a
unit that fell out of use stays valid until its slot is wanted for another one. (The
paper moves rows to keep the used ones together; here the multiplication names the slots
that it wants, so nothing has to move.)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .places import make_places
from .policies import EMPTY, Lru


@dataclass(frozen=True)
class Wave:
    """Units that are in memory together once `missing` were read into their slots.

    Attributes:
        units, slots: `units[i]` is in slot `slots[i]`; units are sorted.
        missing, missing_slots: The pairs that have to be read first.
        ahead: The next wave takes none of these slots: it may be read while this one
            is multiplied.
    """

    units: np.ndarray
    slots: np.ndarray
    missing: np.ndarray
    missing_slots: np.ndarray
    ahead: bool = False

    def slots_of(self, units: np.ndarray) -> np.ndarray:
        """The slots of units of this wave, in any order and as often as wanted."""
        return self.slots[np.searchsorted(self.units, units)]


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
        self.policy = policy.for_layer(units)
        self.apart = apart
        self.slot_of = make_places(units, slots)
        self.unit_of = np.full(slots, EMPTY, np.intp)
        self.valid = np.zeros(slots, bool)
        # One more than slots, so that marking slot EMPTY marks nothing.
        self._marks = np.full(slots + 1, -1, np.int64)
        self.last_used = self._marks[:-1]
        self.now = 0  # tokens seen

    def waves(
        self, units: np.ndarray, tokens: int = 1, keep: np.ndarray | None = None
    ) -> Iterator[Wave]:
        """Bring `units` (sorted, unique) into slots, in as many waves as they need.

        When a wave is asked for, the missing units of all waves before it must have
        `arrived`, and all waves but the last one must have been multiplied (that one
        too, if it was not `ahead`).

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
        present = slots != EMPTY
        absent = np.flatnonzero(~present)
        missing = units[absent]
        room = len(self.unit_of) - len(units) + len(missing)
        if len(missing) > room:
            yield from self._sweep(units, slots, keep)
            return
        # What is under way on a guess comes as late as what is missing.
        there = present & self.valid[slots]
        count, none = int(there.sum()), missing[:0]
        apart = len(units) <= self.apart * len(self.unit_of)
        if apart and 0 < count < len(units):
            taken = slots[absent] = self._assign(missing)
            yield Wave(units[there], slots[there], none, none, ahead=True)
            yield Wave(units[~there], slots[~there], missing, taken)
        else:
            taken = slots[absent] = self._assign(missing)
            yield Wave(units, slots, missing, taken)

    def _sweep(
        self, units: np.ndarray, slots: np.ndarray, keep: np.ndarray | None
    ) -> Iterator[Wave]:
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

    def early(
        self, units: np.ndarray, likely: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Make room for units that the next step will probably need.

        Those of them that are there are not given up for it, nor is more than half of
        all slots: what the next step really needs is often older.

        Args:
            units: int array of unit ids, sorted, unique.
            likely: A number for each unit of the layer, added to the policy's ranks:
                how likely the next step asks for it.

        Returns:
            The units to read, and the slots that they are read into.
        """
        slots = self.slot_of[units]
        self._marks[slots] = self.now
        missing = units[slots == EMPTY]
        if likely is not None:
            missing = np.sort(
                missing[np.argsort(-likely[missing])[: len(self.unit_of) // 2]]
            )
        missing = missing[: len(self.unit_of) // 2]
        return missing, self._assign(missing, likely=likely)

    def arrived(self, slots: np.ndarray) -> None:
        """The bytes of the units that `slots` were given to are there."""
        self.valid[slots] = True

    def forget(self, slots: np.ndarray) -> None:
        """Make slots EMPTY."""
        self.valid[slots] = False
        self.slot_of[self.unit_of[slots]] = EMPTY
        self.unit_of[slots] = EMPTY
        self.last_used[slots] = -1

    def recover(self) -> np.ndarray:
        """Go on after a step that stopped anywhere, with what surely arrived.

        Every other slot becomes EMPTY. Nothing may be under way any more.

        Returns:
            The slots that are EMPTY now: what they hold is no unit.
        """
        lost = np.flatnonzero(~self.valid)
        held = np.flatnonzero(self.valid)
        self.unit_of[lost] = EMPTY
        self.last_used[lost] = -1
        self.slot_of[:] = EMPTY
        self.slot_of[self.unit_of[held]] = held
        return lost

    def resized(
        self, slots: int, most: int
    ) -> tuple["SlotCache", np.ndarray, np.ndarray]:
        """The same bookkeeping over another number of slots, with what ranks highest.

        Nothing may be under way. Where there is a slot for every unit, unit i is in
        slot i. The policy, with all that it remembers, goes over to the new one.

        Args:
            slots: Their new number.
            most: How many units may stay.

        Returns:
            The new bookkeeping; (old slots, new slots) of the units that are kept.
        """
        new = SlotCache(len(self.slot_of), slots, self.policy, self.apart)
        new.policy, new.now = self.policy, self.now
        held, most = np.flatnonzero(self.valid), min(most, slots)
        if len(held) > most:
            ranks = self.policy.ranks(self)[held]
            held = np.sort(held[np.argsort(ranks)[len(held) - most :]])
        units = self.unit_of[held]
        taken = units if slots == len(self.slot_of) else np.arange(len(held))
        new.unit_of[taken] = units
        new.slot_of[units] = taken
        new.last_used[taken] = self.last_used[held]
        new.valid[taken] = True
        return new, held, taken

    def _assign(
        self,
        units: np.ndarray,
        blocked: np.ndarray | None = None,
        likely: np.ndarray | None = None,
    ) -> np.ndarray:
        """Give `units` the longest unused of the slots that are not `blocked`.

        `likely`, a number for each unit of the layer, is added to what ranks slots.
        """
        count = len(units)
        if count == 0:
            return units
        ranks, free = self.policy.ranks(self), None
        if likely is not None:
            ranks = ranks + np.where(self.unit_of == EMPTY, 0.0, likely[self.unit_of])
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
        self.valid[slots] = False  # first: whatever stops us now, they hold nothing
        old = self.unit_of[slots]
        self.slot_of[old[old != EMPTY]] = EMPTY
        self.slot_of[units] = slots
        self.unit_of[slots] = units
        self.last_used[slots] = self.now
        return slots
