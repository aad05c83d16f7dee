"""Dense FFNs of any kind whose weights are on flash as blocks of neurons.

An FFN is a sum over its neurons, so it is a sum over blocks of them. All blocks are
needed for every token; those that memory holds are not read again.
Shapes: T tokens, D model width, n blocks, b neurons of each.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .cache import Wave
from .errors import FlashError
from .ffn import SlotFFN
from .slots import CLOSED, UnitSlots


class BlockFFN(SlotFFN):
    """A dense FFN that is swept block by block, and keeps what fits."""

    apart = 0.0  # all blocks are needed: there are always several waves

    def __init__(self, ffn: nn.Module):
        super().__init__(ffn, columns=True)
        self.store: UnitSlots | None = None  # given by load, taken by close

    def __call__(self, x: mx.array) -> mx.array:
        if self.store is None:
            raise FlashError(CLOSED)
        tokens = x.reshape(-1, x.shape[-1])
        store, y = self.store, None
        if store.holds_all:
            y = store.in_use = self.compute(tokens, store.parts, None)
        else:
            everything = np.arange(store.units, dtype=np.int32)
            for wave in store.fetch(everything, tokens=len(tokens)):
                for run in _runs(wave):
                    part = self._run(tokens, run)
                    y = part if y is None else y.astype(mx.float32) + part
                store.in_use = y
        return self.add_bias(y).astype(x.dtype).reshape(x.shape)

    def _run(self, x: mx.array, run: slice) -> mx.array:
        store = self.store
        b = self._neurons_per_block()
        units = store.cache.unit_of[run].astype(np.int32)
        neurons = mx.array((units[:, None] * b + np.arange(b)).reshape(-1))
        return self.compute(x, store.parts, run, neurons)

    def _neurons_per_block(self) -> int:
        return self.store.parts[f"{self.names[0]}.weight"].shape[1]


def _runs(wave: Wave) -> Iterator[slice]:
    """The neighbouring slots of a wave, together."""
    slots = np.sort(wave.slots)
    for run in np.split(slots, np.flatnonzero(np.diff(slots) > 1) + 1):
        yield slice(int(run[0]), int(run[-1]) + 1)
