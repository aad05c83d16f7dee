"""What stays in memory when slots run short: a small class for each policy."""

from __future__ import annotations

from typing import Protocol

import numpy as np

EMPTY = -1


class Slots(Protocol):
    """What a policy sees of a layer's `SlotCache`.

    Attributes:
        unit_of: The unit of each slot, or EMPTY.
        last_used: The token at which each slot was last used.
        now: Tokens seen.
    """

    unit_of: np.ndarray
    last_used: np.ndarray
    now: int

    def forget(self, slots: np.ndarray) -> None: ...


class Lru:
    """Keep what was used last, in as many slots as there are."""

    def for_layer(self, units: int) -> Lru:
        """The policy of one layer: itself, unless it remembers something of units."""
        return self

    def expire(self, cache: Slots) -> None:
        """Nothing expires: a unit goes when its slot is the oldest one wanted."""

    def use(self, cache: Slots, units: np.ndarray) -> None:
        """A step asks for `units`; `cache.now` counts it already."""

    def expect(self, soon: np.ndarray) -> None:
        """How soon each unit of the layer will be wanted, as somebody foresees it."""

    def ranks(self, cache: Slots) -> np.ndarray:
        """A number for each slot: the lowest are given away first."""
        return cache.last_used


class Window(Lru):
    """The paper's windowing: keep what the last `tokens` tokens used, no longer.

    Where the slots cannot hold that much, the oldest go first, as with `Lru`.
    """

    def __init__(self, tokens: int):
        if tokens < 1:
            raise ValueError(f"a window of {tokens} tokens keeps nothing")
        self.tokens = tokens

    def expire(self, cache: Slots) -> None:
        old = cache.last_used < cache.now - self.tokens
        cache.forget(np.flatnonzero(old & (cache.unit_of != EMPTY)))


class Lrfu(Lru):
    """Keep what was used often and lately (Lee et al., IEEE Trans. Computers 2001).

    Every use of a unit counts one and halves every `half_life` tokens; the unit with
    the smallest sum goes. A short half-life is LRU, an endless one counts uses. What
    was evicted keeps its sum: a layer's history is 8 bytes a unit.
    """

    # Neurons of the demo model: 16 gave most hits of 1, 2, 4, … 256 at any budget,
    # and 8 to 64 were within a point of it.
    HALF_LIFE = 16

    def __init__(self, half_life: int = HALF_LIFE, units: int = 0):
        if half_life < 1:
            raise ValueError(f"a half-life of {half_life} tokens remembers nothing")
        self.half_life = half_life
        self._sums = np.zeros(units)
        self._since = 0

    def for_layer(self, units: int) -> Lrfu:
        return Lrfu(self.half_life, units)

    def use(self, cache: Slots, units: np.ndarray) -> None:
        """Instead of all old uses shrinking, new ones count for more."""
        if len(units) == len(self._sums):
            return  # a swept prompt does not tell one unit from another
        while cache.now - self._since > 512 * self.half_life:
            self._sums *= 2.0**-512  # far from what a float can hold
            self._since += 512 * self.half_life
        self._sums[units] += 2.0 ** ((cache.now - self._since) / self.half_life)

    def ranks(self, cache: Slots) -> np.ndarray:
        ranks = self._sums[cache.unit_of]
        ranks[cache.unit_of == EMPTY] = -1
        ranks[cache.last_used == cache.now] = np.inf  # this step needs them
        return ranks


class Foreseen(Lrfu):
    """Keep what is expected soon: what LRFU keeps, and what the layer's input tells.

    LRFU's sum, as the share of tokens that used a unit lately, is added to what
    `layers.foresight` expects of the next tokens. Without that it is LRFU.
    """

    def __init__(self, half_life: int, units: int = 0):
        super().__init__(half_life, units)
        self._soon: np.ndarray | None = None

    def for_layer(self, units: int) -> Foreseen:
        return Foreseen(self.half_life, units)

    def expect(self, soon: np.ndarray) -> None:
        self._soon = soon

    def ranks(self, cache: Slots) -> np.ndarray:
        if self._soon is None:
            return super().ranks(cache)
        faded = 2.0 ** ((self._since - cache.now) / self.half_life)
        share = faded * (1 - 2.0 ** (-1 / self.half_life))
        ranks = (self._sums * share + self._soon)[cache.unit_of]
        ranks[cache.unit_of == EMPTY] = -np.inf
        ranks[cache.last_used == cache.now] = np.inf  # this step needs them
        return ranks
