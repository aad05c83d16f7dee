"""Say which neurons a token will need, before their weights are there.

Two thin matrices stand for the up (or gate) projection: a neuron is predicted active
where its low-rank score exceeds zero. The threshold that was chosen for the target
recall is folded into the bias, so that one comparison serves all layers. (LLM in a
flash, section 3.2; Deja Vu, arXiv 2310.17157.)
Shapes: T tokens, D model width, N neurons, r rank.
"""

import mlx.core as mx
import mlx.nn as nn


class Predictor(nn.Module):
    """Low-rank scores of an FFN's neurons from the FFN's own input."""

    def __init__(self, dims: int, units: int, rank: int):
        super().__init__()
        self.reduce = mx.zeros((rank, dims))
        self.expand = mx.zeros((units, rank))
        self.bias = mx.zeros((units,))

    def __call__(self, x: mx.array) -> mx.array:
        """bool [T, N]: which neurons to compute for each of the tokens x [T, D]."""
        return (x @ self.reduce.T) @ self.expand.T + self.bias > 0
