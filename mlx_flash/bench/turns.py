"""Several models decode the same tokens in turn, so that a busy machine slows all."""

import time
from collections.abc import Mapping, Sequence
from statistics import median, quantiles

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..memory.stats import Stats
from .report import Row, Sample, progress


class Turns:
    """What each model took for each token that counts.

    Attributes:
        samples: By the model's name, a sample a token. A model that is not from
            flash has all its time as compute.
        losses: By the model's name, that of each token which follows one that counts.
    """

    def __init__(self, models: Mapping[str, nn.Module], warm_up: int):
        self.models, self.warm_up = models, warm_up
        self.samples: dict[str, list[Sample]] = {name: [] for name in models}
        self.losses: dict[str, list[float]] = {name: [] for name in models}

    def play(self, tokens: Sequence[int]) -> None:
        """Feed the tokens to each model, whoever begins changing from one to the next.

        Args:
            tokens: Of which the first `warm_up` only fill slots and caches.
        """
        caches = {name: make_prompt_cache(m) for name, m in self.models.items()}
        names = list(self.models)
        for i, token in enumerate(progress(tokens, "measuring", "token")):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                model = self.models[name]
                stats = model.flash.stats if hasattr(model, "flash") else Stats()
                before, begin = stats.copy(), time.perf_counter()
                logits = model(mx.array([[token]]), cache=caches[name])[0, -1]
                mx.eval(logits)
                seconds = time.perf_counter() - begin
                if i < self.warm_up:
                    continue
                self.samples[name].append(Sample(stats - before, seconds))
                if i + 1 < len(tokens):
                    loss = mx.logsumexp(logits.astype(mx.float32))
                    loss = loss - logits[tokens[i + 1]]
                    self.losses[name].append(loss.item())

    def row(self, name: str, **more) -> Row:
        """The means of a model from flash; its memory is its budget."""
        budget = self.models[name].flash.budget.total_bytes
        return Row.of(name, self.samples[name], budget, **more)

    def median_ms(self, name: str) -> float:
        return median(sample.total_ms for sample in self.samples[name])

    def ratio(self, over: str, under: str) -> tuple[float, float, float]:
        """Quartiles of how many times as long a token took `over` as `under`."""
        pairs = zip(self.samples[over], self.samples[under], strict=True)
        low, middle, high = quantiles([a.total_ms / b.total_ms for a, b in pairs], n=4)
        return low, middle, high

    def ratio_text(self, over: str, under: str) -> str:
        low, middle, high = self.ratio(over, under)
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"
