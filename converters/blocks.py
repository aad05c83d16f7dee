"""Cut the dense FFNs of any mlx-lm checkpoint into blocks of neurons.

A projection into the neurons is cut by rows, the one out of them by columns. A float
column is stored as a row, so that a block is contiguous; quantised weights keep their
packing bit for bit, which is why a block is a multiple of their group size.
Shapes: D model width, N neurons, n blocks, b neurons of each.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..errors import FlashError
from ..layers.block import cut_blocks, ffn_arrays
from ..layers.dense import dense_ffns
from ..layers.projections import count_neurons, packing, projections
from .experts import ExpertConversion

UNIT_BYTES = 2_000_000  # long enough to read at full speed, short enough to share out


def block_parts(ffn: nn.Module) -> dict[str, mx.array]:
    """The arrays of an FFN cut into n blocks, [n, …] each.

    Raises:
        FlashError: If N is no multiple of the quantisation's group size.
    """
    out = ffn[projections(ffn)[1]]
    neurons = count_neurons(out)
    group = (packing(out) or {"group_size": 1})["group_size"]
    total = sum(array.nbytes for array in ffn_arrays(ffn).values())
    size = block_size(neurons, total / neurons, group, UNIT_BYTES)
    return cut_blocks(ffn, neurons // size)


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
