"""Generate with a loaded model and note what every single token cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.generate import generate_step

from ..generation import exact_cache
from .report import Sample


def random_sampler(vocabulary: int) -> Callable[[mx.array], mx.array]:
    """Next tokens at random: what untrained weights would choose means nothing."""
    return lambda logprobs: mx.random.randint(0, vocabulary, logprobs.shape[:-1])


def random_prompt(tokens: int, vocabulary: int) -> mx.array:
    return mx.random.randint(0, vocabulary, (tokens,), key=mx.random.key(0))


@dataclass(frozen=True)
class Decoded:
    """`prompt_s` is the time to the first token (and, computed ahead, the second)."""

    samples: list[Sample]
    prompt_s: float


def decode(
    model,
    prompt: mx.array,
    tokens: int,
    sampler=None,
    before_token: Callable[[], None] | None = None,
) -> Decoded:
    """Samples of `tokens` new tokens; the prompt and the first one are not counted.

    Args:
        model: From `mlx_flash.load_model`.
        before_token: Called before each counted token is made; its reads, if it
            notes them in the model's stats, are that token's.
    """
    flash, samples = model.flash, []
    steps = generate_step(
        prompt,
        model,
        max_tokens=tokens + 2,
        sampler=sampler,
        prompt_cache=exact_cache(model),
        prefill_step_size=flash.budget.prefill_tokens,
    )
    begin = time.perf_counter()
    next(steps)  # computes one token ahead
    prompt_s = time.perf_counter() - begin
    while len(samples) < tokens:
        before, begin = flash.stats.copy(), time.perf_counter()
        if before_token:
            before_token()
        next(steps)
        spent, total = flash.stats - before, time.perf_counter() - begin
        samples.append(Sample.of(spent, total))
    steps.close()
    return Decoded(samples, prompt_s)
