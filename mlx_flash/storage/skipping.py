"""What a model gives up that leaves out the neurons whose gates say little.

A token skips a neuron where its gate's activation is no larger than its layer's
threshold (CATS, arXiv 2404.08763). Each layer has a threshold for each of some shares
of its neurons, and between two shares they lie on a line. What that costs was measured
when the model was converted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_SKIPPED = 0.9
# For each of these, every layer has a threshold.
SHARES = tuple(round(0.05 * i, 2) for i in range(19))
# At these, perplexity is measured while converting.
MEASURED = (0.0, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Skipping:
    """The shares of a layer's neurons that may be skipped, and what it costs.

    Attributes:
        shares: For which layers have thresholds, from 0 up.
        measured: For which `perplexity` was measured, from 0 up, with every token
            skipping, on `tokens` that the thresholds were not made from.
    """

    shares: tuple[float, ...]
    measured: tuple[float, ...]
    perplexity: tuple[float, ...]
    tokens: int

    def threshold(self, thresholds: Sequence[float], share: float) -> float:
        """A layer's threshold for `share`, from those it has for `shares`."""
        for i in range(1, len(self.shares)):
            low, high = self.shares[i - 1 : i + 1]
            if share <= high:
                part = (share - low) / (high - low)
                return thresholds[i - 1] + part * (thresholds[i] - thresholds[i - 1])
        return thresholds[-1]

    def cost(self, share: float) -> str:
        """What a run that skips `share` has to say of its output."""
        skipping = range(1, len(self.measured))
        nearest = min(skipping, key=lambda i: (abs(self.measured[i] - share), -i))
        words = (
            f"skip {share:.0%}: lossy, perplexity {self.perplexity[0]:,.2f} → "
            f"{self.perplexity[nearest]:,.2f} on calibration text"
        )
        if not math.isclose(self.measured[nearest], share):
            words += f" (measured at {self.measured[nearest]:.0%})"
        return words

    def summary(self) -> str:
        """All that was measured, in a line."""
        pairs = zip(self.measured, self.perplexity, strict=True)
        costs = ", ".join(f"{share:.0%} → {cost:,.2f}" for share, cost in pairs)
        return f"perplexity by the share skipped: {costs} ({self.tokens:,} tokens)"

    def problem(self, layers: Sequence[Sequence[float]]) -> str | None:
        """What contradicts itself in it or in the thresholds of `layers`, if anything.

        The values may be any that JSON can hold.
        """
        if not _rise(self.shares) or not 0.0 == self.shares[0] < self.shares[-1] <= 1:
            return "the shares to skip do not rise from 0"
        if not _rise(self.measured) or self.measured[0] or len(self.measured) < 2:
            return "the measured shares do not rise from 0"
        if len(self.perplexity) != len(self.measured):
            return "not every measured share has a perplexity"
        if not all(1 <= cost < math.inf for cost in self.perplexity):
            return "a perplexity is impossible"
        for i, thresholds in enumerate(layers):
            if len(thresholds) != len(self.shares):
                return (
                    f"layer {i} has {len(thresholds)} thresholds for "
                    f"{len(self.shares)} shares"
                )
            steps = zip((0.0, *thresholds), thresholds, strict=False)
            if not all(low <= high < math.inf for low, high in steps):
                return f"the thresholds of layer {i} do not rise"
        return None


def _rise(values: Sequence[float]) -> bool:
    return bool(values) and all(
        low < high for low, high in zip(values, values[1:], strict=False)
    )
