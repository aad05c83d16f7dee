"""Guess the next tokens, cheaply: the model then verifies them in one call.

A guess costs little, and a wrong one changes no answer (see `speculation`).
"""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

from .draft_model import CHUNK
from .memory.footprint import KV_STEP


class Drafter(Protocol):
    """What guesses tokens; one object serves one generation."""

    def draft(self, known: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `known`; none if it has no idea.

        Args:
            known: Prompt and answer so far. It only grows from call to call.
        """
        ...


class NgramDraft:
    """Drafts what followed the last tokens where they stood before.

    Prompt-lookup decoding: texts quote, repeat names, and copy code. It needs no
    second model, and drafts nothing where nothing repeats.

    Args:
        longest: Tokens that have to be the same, if there are so many; else fewer,
            but not below two.
    """

    def __init__(self, longest: int):
        self._sizes = range(longest, min(longest, 2) - 1, -1)
        self._behind: dict[tuple[int, ...], int] = {}  # n-gram → where it last ended
        self._indexed = 1

    def draft(self, known: Sequence[int], most: int) -> list[int]:
        # The n-gram at the end of `known` has nothing behind it yet.
        for end in range(self._indexed, len(known)):
            for n in self._sizes:
                if n <= end:
                    self._behind[tuple(known[end - n : end])] = end
        self._indexed = max(len(known), 1)
        for n in self._sizes:
            start = self._behind.get(tuple(known[-n:])) if n <= len(known) else None
            if start is not None:
                return _copied(known, start, most)
        return []


def _copied(known: Sequence[int], start: int, most: int) -> list[int]:
    """`most` tokens from `start` on, around and around if `known` ends before."""
    period = len(known) - start
    return [known[start + i % period] for i in range(most)]


class ModelDraft:
    """Drafts what a small model would say, greedily.

    Greedily also when the answer is sampled: a token is accepted if the large model
    draws the same, which it does most often for the likeliest one.

    Args:
        model: mlx-lm's, with the tokens of the large one and a cache that can be
            trimmed.
        vocabulary: Tokens that the large model knows.
        context: Drafts nothing once there are more tokens; None is no limit.
    """

    def __init__(self, model: nn.Module, vocabulary: int, context: int | None = None):
        self._model = model
        self._vocabulary = vocabulary
        self._context = context
        self._cache = make_prompt_cache(model)
        for entry in self._cache:
            if hasattr(entry, "step"):
                entry.step = KV_STEP  # mlx-lm's 256 tokens may be a lot of memory
        self._known = 0  # tokens of `known` that the model has read
        self._fed: list[int] = []  # drafted ones that it read after them

    def draft(self, known: Sequence[int], most: int) -> list[int]:
        if most < 1 or (self._context and len(known) + most > self._context):
            return []
        new = known[self._known :]
        right = _same(self._fed, new)
        trim_prompt_cache(self._cache, len(self._fed) - right)
        self._fed = []
        self._known += right
        with mx.stream(generation_stream):
            self._read(known[self._known : -1])
            drafted = self._guess(known[-1], most)
        self._known = len(known)
        self._fed = drafted[:-1]
        unknown = [i for i, token in enumerate(drafted) if token >= self._vocabulary]
        return drafted[: unknown[0]] if unknown else drafted

    def _read(self, tokens: Sequence[int]) -> None:
        for start in range(0, len(tokens), CHUNK):
            piece = mx.array(list(tokens[start : start + CHUNK]))
            self._model(piece[None], cache=self._cache)
            mx.eval([entry.state for entry in self._cache])

    def _guess(self, last: int, most: int) -> list[int]:
        token = mx.array([last])
        drafted = []
        for _ in range(most):
            logits = self._model(token[None], cache=self._cache)[:, -1]
            token = mx.argmax(logits, axis=-1)
            mx.async_eval(token)
            drafted.append(token)
        return np.asarray(mx.concatenate(drafted)).tolist()


def _same(drafted: Sequence[int], known: Sequence[int]) -> int:
    """How many tokens are the same from the first one on."""
    pairs = zip(drafted, known, strict=False)
    return next(
        (i for i, (a, b) in enumerate(pairs) if a != b),
        min(len(drafted), len(known)),
    )
