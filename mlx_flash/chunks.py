"""Whoever calls a model with a long prompt: it goes through it chunk by chunk.

mlx-lm's loops cut prompts into 2,048 tokens of each sequence, whatever memory there is.
The model itself knows better how many fit, so it cuts them once more, and has slots
give way where that lets chunks be longer.
"""

from functools import cache, wraps
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .errors import FlashError

NOT_TOKENS = (
    "On several machines a model is called with tokens [B, L] and a cache alone. Run "
    "it on one machine for anything else."
)


def in_chunks(model: nn.Module) -> None:
    """Have `model`, one of mlx-lm's, ask `model.flash.pool` before every call.

    A call without a cache, or with more than tokens, goes through as it is.
    """
    model.__class__ = _cutting(type(model))


@cache
def _cutting(whole: type[nn.Module]) -> type[nn.Module]:
    """The same class with another `__call__`, which Python looks for nowhere else.

    It knows no model: a class lives on in circles until somebody collects them.
    """

    @wraps(whole.__call__)
    def call(self, inputs: mx.array, cache: Any = None, *args: Any, **kwargs: Any):
        plain = inputs is not None and inputs.ndim == 2 and not (args or kwargs)

        def in_pieces(size: int) -> mx.array:
            if cache is None:
                return whole.__call__(self, inputs)
            logits: list[mx.array] = []
            for start in range(0, inputs.shape[1], size):
                if start:
                    waiting = logits[-1:] if self.flash.pool.logits_pay else []
                    mx.eval([entry.state for entry in cache], waiting)
                    self.flash.told_of_prompt(start)
                piece = inputs[:, start : start + size]
                logits.append(whole.__call__(self, piece, cache=cache))
            return logits[0] if len(logits) == 1 else mx.concatenate(logits, axis=1)

        if self.flash.machines is not None:
            if not plain:
                raise FlashError(NOT_TOKENS)
            return self.flash.machines(self, inputs, cache, in_pieces)
        if cache is None or not plain:
            return whole.__call__(self, inputs, cache, *args, **kwargs)
        B, L = inputs.shape
        return in_pieces(max(self.flash.pool.prepare(B, L, cache) // B, 1))

    return type(whole.__name__, (whole,), {"__call__": call})
