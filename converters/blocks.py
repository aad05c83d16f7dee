"""Cut the dense FFNs of any mlx-lm checkpoint into blocks of neurons.

A projection into the neurons is cut by rows, the one out of them by columns. A float
column is stored as a row, so that a block is contiguous; quantised weights keep their
packing bit for bit, which is why a block is a multiple of their group size.
Shapes: D model width, N neurons, n blocks, b neurons of each.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..dense import dense_ffns
from ..errors import FlashError
from ..ffn import packing, projections
from .experts import ExpertConversion

UNIT_BYTES = 2_000_000  # long enough to read at full speed, short enough to share out


def ffn_arrays(ffn: nn.Module) -> dict[str, mx.array]:
    """What goes to flash: the projections' weights; their biases stay resident."""
    ins, out = projections(ffn)
    return {
        f"{name}.{key}": array
        for name in (*ins, out)
        for key, array in ffn[name].items()
        if key != "bias" and isinstance(array, mx.array)
    }


def block_parts(ffn: nn.Module) -> dict[str, mx.array]:
    """The arrays of an FFN cut into n blocks, [n, …] each.

    Raises:
        FlashError: If N is no multiple of the quantisation's group size.
    """
    ins, out = projections(ffn)
    arrays = ffn_arrays(ffn)
    neurons = ffn[ins[0]].weight.shape[0]
    group = (packing(ffn[out]) or {"group_size": 1})["group_size"]
    total = sum(array.nbytes for array in arrays.values())
    n = neurons // block_size(neurons, total / neurons, group, UNIT_BYTES)
    parts = {}
    for name, array in arrays.items():
        if not name.startswith(f"{out}."):
            parts[name] = array.reshape(n, -1, array.shape[1])
        elif packing(ffn[out]):
            parts[name] = array.reshape(array.shape[0], n, -1).swapaxes(0, 1)
        else:
            parts[name] = array.T.reshape(n, -1, array.shape[0])
    return parts


def block_size(neurons: int, neuron_bytes: float, group: int, unit_bytes: int) -> int:
    """Neurons of a block: the largest divisor that fits `unit_bytes`, whole groups."""
    if neurons % group:
        raise FlashError(f"{neurons} neurons cannot be cut into groups of {group}.")
    sizes = [b for b in range(group, neurons + 1, group) if neurons % b == 0]
    fitting = [b for b in sizes if b * neuron_bytes <= unit_bytes]
    return max(fitting, default=sizes[0])


class BlockConversion(ExpertConversion):
    """One dense checkpoint, layer by layer."""

    unit = "block"
    activation = "module"  # whatever the model's own FFN does
    find = staticmethod(dense_ffns)
    arrays = staticmethod(ffn_arrays)
    split = staticmethod(block_parts)
