"""Cut the dense FFNs of any mlx-lm checkpoint into blocks of neurons.

A projection into the neurons is cut by rows, the one out of them by columns. A float
column is stored as a row, so that a block is contiguous; quantised weights keep their
packing bit for bit, which is why a block is a multiple of their group size.
Shapes: D model width, N neurons, n blocks, b neurons of each.
"""

from __future__ import annotations

from ..layers.block import block_parts, ffn_arrays
from ..layers.dense import dense_ffns
from .experts import ExpertConversion


class BlockConversion(ExpertConversion):
    """One dense checkpoint, layer by layer."""

    unit = "block"
    activation = "module"  # whatever the model's own FFN does
    find = staticmethod(dense_ffns)
    arrays = staticmethod(ffn_arrays)
    split = staticmethod(block_parts)
