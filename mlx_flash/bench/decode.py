"""Generate with a loaded model and note what every single token cost."""

import gc
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from ..loading import load_model
from .report import Row, Sample

Sampler = Callable[[mx.array], mx.array]


def random_sampler(vocabulary: int) -> Sampler:
    """Next tokens at random: what untrained weights would choose means nothing."""
    return lambda logprobs: mx.random.randint(0, vocabulary, logprobs.shape[:-1])


def random_prompt(tokens: int, vocabulary: int) -> mx.array:
    return mx.random.randint(0, vocabulary, (tokens,), key=mx.random.key(0))


def decode(
    model: nn.Module,
    prompt: mx.array,
    tokens: int,
    sampler: Sampler | None = None,
    before_token: Callable[[], object] | None = None,
) -> tuple[list[Sample], float]:
    """Samples of `tokens` new tokens, and the seconds to the first one (and, computed
    ahead, the second), which with the prompt are not counted.

    Args:
        model: From `mlx_flash.load_model`.
        prompt: Token ids, [L].
        sampler: As mlx-lm's; None decodes greedily.
        before_token: Called before each counted token is made; its reads, if it
            notes them in the model's stats, are that token's.
    """
    flash = model.flash
    samples: list[Sample] = []
    steps = generate_step(
        prompt,
        model,
        max_tokens=tokens + 2,
        sampler=sampler,
        prompt_cache=make_prompt_cache(model),
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
        samples.append(Sample(spent, total))
    steps.close()
    return samples, prompt_s


def run_model(
    name: str,
    folder: str | Path,
    memory: int | float | str,
    prompt_tokens: int,
    tokens: int,
    *,
    greedy: bool = False,
    warm_up: int = 0,
    prepare: Callable[[nn.Module], Callable[[], object]] | None = None,
    page_cache: str = "off",
    **options,
) -> Row:
    """Load a model, read a prompt of random tokens, generate, close.

    Args:
        name: Of the row.
        folder: A flash folder, or a checkpoint that is streamed in place.
        memory: Its budget.
        tokens: New tokens that count, after `warm_up` others.
        greedy: Take the likeliest token instead of a random one.
        prepare: Makes `before_token`, as `decode` takes it, of the loaded model.
        page_cache: Off by default: then every run reads the flash, and none the cache
            that an earlier one filled.
        options: As `load_model` takes them.

    Returns:
        The row of the tokens that count; its memory is what MLX allocated.
    """
    options |= {"page_cache": page_cache}
    # Two more: the first token and the one that is computed ahead.
    context = prompt_tokens + warm_up + tokens + 2
    begin = time.perf_counter()
    with load_model(folder, memory, context=context, **options) as (model, config):
        flash, load_s = model.flash, time.perf_counter() - begin
        vocabulary = config["vocab_size"]
        mx.random.seed(0)
        samples, prompt_s = decode(
            model,
            random_prompt(prompt_tokens, vocabulary),
            warm_up + tokens,
            None if greedy else random_sampler(vocabulary),
            prepare(model) if prepare else None,
        )
        slots = sum(flash.budget.slots)
        units = sum(layer.units for layer in flash.manifest.layers)
        row = Row.of(
            name,
            samples[warm_up:],
            mx.get_peak_memory(),
            budget_bytes=flash.budget.total_bytes,
            model_bytes=flash.manifest.model_bytes,
            slots=slots,
            units=units,
            slot_share=slots / units,
            direct_io=flash.direct_io,
            load_s=load_s,
            prompt_s=prompt_s,
        )
    del model, flash
    gc.collect()
    mx.clear_cache()
    return row
