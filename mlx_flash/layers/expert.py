"""Mixture-of-experts layers whose experts are on flash.

mlx-lm's own `SwitchGLU` or `SwitchMLP` does the multiplying: its weights are exchanged
for slots, and it is given slot numbers where it was given expert numbers. Activations,
biases, quantisation and sorting stay its business, and so the result is its result.
Shapes: T tokens, K experts of each token, D model width.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)

from ..errors import FlashError
from ..memory.slots import CLOSED, UnitSlots
from .lookahead import Guess

SWITCHES = (SwitchGLU, SwitchMLP)
LINEARS = (SwitchLinear, QuantizedSwitchLinear)

# From so many (token, expert) pairs on, mlx-lm sorts them and uses another kernel.
SORT_PAIRS = 64


def switch_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every switch layer of a model by its path, in the order of the layers."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, SWITCHES)}

    def order(path: str) -> list[tuple[int, str]]:
        return [(int(p) if p.isdigit() else -1, p) for p in path.split(".")]

    return dict(sorted(found.items(), key=lambda item: order(item[0])))


def switch_parts(switch: nn.Module) -> dict[str, mx.array]:
    """Every array of a switch layer by name, [experts, …]: weights, scales, biases."""
    parts = {}
    for name, linear in switch.children().items():
        if isinstance(linear, LINEARS):
            parts |= {
                f"{name}.{key}": value
                for key, value in linear.items()
                if isinstance(value, mx.array)
            }
    return parts


class ExpertFFN(nn.Module):
    """A switch layer that has its experts brought when the router chose them."""

    apart = 1.0  # experts in memory are always multiplied while others are read

    def __init__(self, switch: nn.Module):
        super().__init__()
        self._switch = switch  # the underscore: its arrays are slots, not parameters
        for name, child in switch.children().items():
            if not isinstance(child, LINEARS):
                self[name] = child  # Muse Spark keeps a norm beside the projections
        self._store: UnitSlots | None = None
        self._next: tuple[ExpertFFN, Guess] | None = None

    def look_ahead(self, layer: ExpertFFN, guess: Guess) -> None:
        """Read early what `layer`, the next one, will choose by the `guess` of it."""
        self._next = layer, guess

    @property
    def store(self) -> UnitSlots | None:
        return self._store

    @store.setter
    def store(self, store: UnitSlots | None) -> None:
        self._store = store
        if store is None:
            self._switch = None  # it holds the slots
            return
        for name, array in (store.parts if store else {}).items():
            linear, key = name.rsplit(".", 1)
            self._switch[linear][key] = array

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        store = self.store
        if store is None:
            raise FlashError(CLOSED)
        if store.holds_all:
            y = self._switch(x, indices)
        else:
            guess = self._guess(x, indices)
            # The one point where the host waits for MLX: it must know what to read.
            mx.eval([indices] if guess is None else [indices, guess])
            y = self._stream(x, np.asarray(indices), guess)
        store.in_use = y
        return y

    def _guess(self, x: mx.array, indices: mx.array) -> mx.array | None:
        """What the next layer would choose for a few tokens, were its input ours."""
        if self._next is None or indices.size >= SORT_PAIRS:
            return None
        layer, guess = self._next
        if layer.store is None or layer.store.holds_all:
            return None
        return guess(x, indices.shape[-1])

    def _stream(
        self, x: mx.array, chosen: np.ndarray, guess: mx.array | None
    ) -> mx.array:
        store, K = self.store, chosen.shape[-1]
        needed = np.unique(chosen).astype(np.int32)
        pairs = chosen.reshape(-1)
        rows = x.reshape(-1, x.shape[-1])
        done, outputs = [], []
        last = np.unique(chosen.reshape(-1, K)[-1])  # the next token's, probably
        for wave in store.fetch(needed, len(pairs) // K, last):
            if guess is not None:  # queued behind what this layer waits for
                self._next[0].store.read_early(np.unique(np.asarray(guess)))
                guess = None
            if len(wave.units) == len(needed):
                return self._switch(x, mx.array(store.cache.slot_of[chosen]))
            mine = np.flatnonzero(np.isin(pairs, wave.units))
            slots = store.cache.slot_of[pairs[mine]]
            store.in_use = self._pairs(rows, mine, K, slots, len(pairs))
            done.append(mine)
            outputs.append(store.in_use)
        order = np.argsort(np.concatenate(done))
        y = mx.concatenate(outputs)[mx.array(order)]
        return y.reshape(*chosen.shape, -1)

    def _pairs(self, rows, mine, K: int, slots, total: int) -> mx.array:
        """The outputs [P, D] of P pairs of a token and an expert's slot.

        Where mlx-lm would have sorted all pairs, a short wave is filled up so that it
        is sorted too: on a GPU the two kernels round differently.
        """
        count = len(mine)
        if total >= SORT_PAIRS > count:
            mine = np.resize(mine, SORT_PAIRS)
            slots = np.resize(slots, SORT_PAIRS)
        y = self._switch(rows[mx.array(mine // K)], mx.array(slots[:, None]))
        return y[:count, 0]
