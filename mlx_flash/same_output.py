"""Compare what a model answers at several budgets, for `verify --budget`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from .errors import FlashError
from .generation import stream_generate
from .loading import load_model, load_tokenizer
from .prompts import encode_prompt

# What sums in another order may differ by, as a share of the largest log probability:
# some hundred roundings of the dtype. Measured: 6e-4 (the demo model, float16), 1e-6
# (SmolLM2, float32).
CLOSE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}


@dataclass(frozen=True)
class Output:
    """What a model answered at one budget.

    Attributes:
        memory: As it was asked for.
        budget_bytes: As it came out.
        hit_rate: Of the run; None where all was held.
        dtype: Of the model's activations.
        tokens: Of the answer, chosen greedily.
        logprobs: Of every token of the vocabulary at each of these, [tokens, V].
    """

    memory: int | str
    budget_bytes: int
    hit_rate: float | None
    dtype: str
    tokens: list[int]
    logprobs: np.ndarray


@dataclass(frozen=True)
class Agreement:
    """How far answers agree.

    Attributes:
        tokens: So many are the same in all of them.
        worst: The largest difference between log probabilities up to there, as a share
            of the largest one; 0 is bit for bit.
        tied: Whether two tokens were as likely as each other then, so that the answers
            part there.
    """

    tokens: int
    worst: float
    tied: bool


def output(
    folder: Path, memory: int | str, prompt: str, max_tokens: int, **options
) -> Output:
    """The greedy answer of a model at one budget.

    Raises:
        FlashError: If the model cannot be loaded with it.
    """
    tokenizer = load_tokenizer(folder)
    ids = encode_prompt(tokenizer, prompt)
    options.setdefault("context", len(ids) + max_tokens)
    tokens, logprobs = [], []
    with load_model(folder, memory, **options) as (model, _):
        for step in stream_generate(model, tokenizer, ids, max_tokens=max_tokens):
            tokens.append(step.token)
            logprobs.append(np.array(step.logprobs.astype(mx.float32)))
        flash = model.flash
        return Output(
            memory,
            flash.budget.total_bytes,
            flash.report().hit_rate,
            flash.manifest.dtype,
            tokens,
            np.stack(logprobs),
        )


def compare(outputs: Sequence[Output]) -> Agreement:
    """Hold every answer against the first one.

    Raises:
        FlashError: If one differs by more than the order of a sum explains.
    """
    first = outputs[0]
    found = [_compare(first, other) for other in outputs[1:]]
    return Agreement(
        min(one.tokens for one in found),
        max(one.worst for one in found),
        any(one.tied for one in found),
    )


def _compare(first: Output, other: Output) -> Agreement:
    names = f"at {other.memory} and at {first.memory}"
    close, worst = CLOSE.get(first.dtype, CLOSE["bfloat16"]), 0.0
    for place, (one, two) in enumerate(zip(first.tokens, other.tokens, strict=False)):
        a, b = first.logprobs[place], other.logprobs[place]
        scale = float(np.abs(a[np.isfinite(a)]).max(initial=1e-9))
        difference = float(np.abs(a - b)[np.isfinite(a)].max(initial=0.0)) / scale
        if not difference <= close:
            raise FlashError(
                f"Log probabilities of token {place + 1} differ by {difference:.0e} of "
                f"the largest {names}, more than the order of a sum explains. Please "
                "report this with the model's name."
            )
        if one != two:  # by so little that they were a tie
            return Agreement(place, worst, True)
        worst = max(worst, difference)
    return Agreement(len(first.tokens), worst, False)
