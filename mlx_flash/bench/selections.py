"""SYNTHETIC selections: which neurons a token uses, with the paper's statistics.

A tenth of a layer is selected, and so much of it again by the next tokens that a window
of four brings 2.4 % of the layer per token. No model made these selections; whoever
prints figures from them has to say so.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np

from ..memory.policies import Lru
from ..memory.slot_cache import SlotCache
from .report import progress

# Shares of variance of a neuron's score: what it always has and what drifts. The rest
# is drawn anew for every token, and is what `calibrated` sets.
STATIC_TO_SLOW = 3 / 5
DRIFT_TOKENS = 8


class Selections:
    """The top `share` of scores with a memory.

    A neuron's score at a token is the sum of three Gaussians: its popularity, a part
    that drifts over some tokens (the topic), and noise. Each layer has its own.
    """

    def __init__(self, units: int, share: float, noise: float, seed: int):
        self.count = max(round(share * units), 1)
        slow = (1 - noise) / (1 + STATIC_TO_SLOW)
        self.scales = (slow * STATIC_TO_SLOW) ** 0.5, slow**0.5, noise**0.5
        self.draw = partial(
            np.random.default_rng(seed).standard_normal, units, np.float32
        )
        self.popularity, self.drift = self.draw(), self.draw()

    def tokens(self, count: int) -> Iterator[np.ndarray]:
        """The next `count` selections, each sorted unit ids, int32."""
        keep = math.exp(-1 / DRIFT_TOKENS)
        a, b, c = self.scales
        for _ in range(count):
            self.drift = keep * self.drift + (1 - keep**2) ** 0.5 * self.draw()
            score = a * self.popularity + b * self.drift + c * self.draw()
            chosen = np.argpartition(score, -self.count)[-self.count :]
            yield np.sort(chosen).astype(np.int32)


def calibrated(
    units: int, share: float, slots: int, missing: float, policy: Lru
) -> float:
    """The noise at which `slots` under `policy` miss `missing` of the layer per token.

    Found by bisection, playing selections against the real bookkeeping without reading.
    """

    def misses(noise: float) -> float:
        chosen = Selections(units, share, noise, seed=1_000).tokens(120)
        return miss_share(chosen, units, slots, policy, warm=30)

    steps = progress(range(8), "calibrating")
    return bisect(lambda noise: misses(noise) >= missing, 1.0, steps)


def bisect(enough: Callable[[float], bool], high: float, steps: Iterable) -> float:
    """Where, between 0 and `high`, `enough` becomes true: a halving in each step."""
    low = 0.0
    for _ in steps:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return (low + high) / 2


def miss_share(
    selections: Iterable[np.ndarray], units: int, slots: int, policy: Lru, warm: int
) -> float:
    """Share of a layer that is missing per token, after `warm` tokens."""
    cache = SlotCache(units, slots, policy)
    misses = [
        sum(len(wave.missing) for wave in cache.waves(chosen)) for chosen in selections
    ]
    return sum(misses[warm:]) / (len(misses) - warm) / units
