"""Projections over slots with a LoRA adapter, whose weights stay in memory.

What a call multiplies of the adapter are the rows or columns of its own neurons.
Shapes: T tokens, D model width, K neurons now, r rank.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class _Adapted(nn.Module):
    """A projection and its adapter, by the names that mlx-lm's LoRA layers have."""

    def __init__(self, linear: Any, r: int, scale: float):
        super().__init__()
        self.linear = linear
        self.scale = scale
        self.lora_a = mx.zeros((linear.width, r))
        self.lora_b = mx.zeros((r, linear.outputs))


class AdaptedInto(_Adapted):
    """A projection into neurons: the adapter's columns are theirs."""

    def __call__(
        self,
        x: mx.array,
        arrays: Mapping[str, mx.array],
        neurons: mx.array | None,
        ids: mx.array | None = None,
    ) -> mx.array:
        """As `slot_ffn.Into` has it."""
        y = self.linear(x, arrays, neurons, ids)
        z = (x @ self.lora_a) @ self.linear.of(neurons, self.lora_b)
        return y + (self.scale * z).astype(x.dtype)


class AdaptedOutOf(_Adapted):
    """The projection out of them: the adapter's rows are theirs."""

    def __call__(
        self,
        h: mx.array,
        arrays: Mapping[str, mx.array],
        neurons: mx.array | None,
        through: Callable[[mx.array], mx.array] | None,
        ids: mx.array | None = None,
    ) -> mx.array:
        """As `slot_ffn.OutOf` has it."""
        if through is not None:
            h = through(h)
        y = self.linear(h, arrays, neurons, None, ids)
        rows = self.lora_a if neurons is None else self.lora_a[neurons]
        return y + (self.scale * ((h @ rows) @ self.lora_b)).astype(y.dtype)
