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

from ..errors import FlashError
from ..memory.slot_cache import Wave
from ..memory.slots import CLOSED, UnitSlots
from .projections import HALVES, SlotFFN, count_neurons, packing, projections

BLOCK_BYTES = 2_000_000  # long enough to read at full speed, short enough to share


def ffn_arrays(ffn: nn.Module) -> dict[str, mx.array]:
    """What goes to flash: the projections' weights; their biases stay resident."""
    ins, out = projections(ffn)
    return {
        f"{name}.{key}": array
        for name in (*ins, out)
        for key, array in ffn[name].items()
        if key != "bias" and isinstance(array, mx.array)
    }


def cut_blocks(ffn: nn.Module, n: int) -> dict[str, mx.array]:
    """The arrays of an FFN cut into n blocks, [n, …] each.

    Ways in are cut by rows, [n, b, D], or [n, 2, b, D] where one holds all gate rows
    before all up rows. The way out is cut by columns: a float column is stored as a
    row, [n, b, D]; a packed one stays in its packing, [n, D, b'].
    """
    ins, out = projections(ffn)
    parts = {}
    for key, array in ffn_arrays(ffn).items():
        name, width = key.split(".")[0], array.shape[-1]
        if name == out and packing(ffn[out]):
            parts[key] = array.reshape(len(array), n, -1).swapaxes(0, 1)
        elif name == out:
            parts[key] = array.T.reshape(n, -1, len(array))
        elif name in HALVES:
            parts[key] = array.reshape(2, n, -1, width).swapaxes(0, 1)
        else:
            parts[key] = array.reshape(n, -1, width)
    return parts


def block_parts(ffn: nn.Module) -> dict[str, mx.array]:
    """The arrays of an FFN cut into n blocks, [n, …] each.

    Raises:
        FlashError: If N is no multiple of the quantisation's group size.
    """
    out = ffn[projections(ffn)[1]]
    neurons = count_neurons(out)
    group = (packing(out) or {"group_size": 1})["group_size"]
    total = sum(array.nbytes for array in ffn_arrays(ffn).values())
    size = block_size(neurons, total / neurons, group, BLOCK_BYTES)
    return cut_blocks(ffn, neurons // size)


def block_size(neurons: int, neuron_bytes: float, group: int, unit_bytes: int) -> int:
    """Neurons of a block: the largest divisor that fits `unit_bytes`, whole groups."""
    if neurons % group:
        raise FlashError(f"{neurons} neurons cannot be cut into groups of {group}.")
    sizes = [b for b in range(group, neurons + 1, group) if neurons % b == 0]
    fitting = [b for b in sizes if b * neuron_bytes <= unit_bytes]
    return max(fitting, default=sizes[0])


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
        b = self.neurons // store.units
        units = store.cache.unit_of[run].astype(np.int32)
        neurons = mx.array((units[:, None] * b + np.arange(b)).reshape(-1))
        return self.compute(x, store.parts, run, neurons)


def _runs(wave: Wave) -> Iterator[slice]:
    """The neighbouring slots of a wave, together."""
    slots = np.sort(wave.slots)
    for run in np.split(slots, np.flatnonzero(np.diff(slots) > 1) + 1):
        yield slice(int(run[0]), int(run[-1]) + 1)
