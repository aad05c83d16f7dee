"""Say which neurons a token will need, before their weights are there.

Two thin matrices stand for the up (or gate) projection: a neuron is predicted active
where its low-rank score exceeds zero. The threshold that was chosen for the target
recall is folded into the bias, so that one comparison serves all layers. (LLM in a
flash, section 3.2; Deja Vu, arXiv 2310.17157.) Both matrices are quantised where their
shape allows it: at 4 bits a predictor of four times the rank takes the same memory,
and rank is what decides how much is read in vain. Where that is much, half as much rank
again is worth the fourth bit: 3 bits do, if they are trained as such (2 do not).
Shapes: T tokens, D model width, N neurons, r rank.
"""

import math

import mlx.core as mx
import mlx.nn as nn

BITS, WIDER_BITS, GROUP_SIZE = 4, 3, 64


class Predictor(nn.Module):
    """Low-rank scores of an FFN's neurons from the FFN's own input.

    `bits` 0 leaves the matrices in floating point.
    """

    def __init__(self, dims: int, units: int, rank: int, bits: int = 0):
        super().__init__()
        self.reduce = nn.Linear(dims, rank, bias=False)
        self.expand = nn.Linear(rank, units, bias=False)
        self.bias = mx.zeros((units,))
        if bits:
            self.quantize(bits)

    def quantize(self, bits: int) -> None:
        nn.quantize(self, group_size=GROUP_SIZE, bits=bits)

    def scores(self, x: mx.array) -> mx.array:
        if mx.default_device() == mx.cpu:
            # Quantised products of float16 took 27 ms there, of float32 1 ms
            # (256 x 2,048 at rank 128, MLX 0.32.4).
            x = x.astype(mx.float32)
        return self.expand(self.reduce(x)) + self.bias

    def __call__(self, x: mx.array) -> mx.array:
        """bool [T, N]: which neurons to compute for each of the tokens x [T, D]."""
        return self.scores(x) > 0


def possible_bits(dims: int, rank: int) -> int:
    """The width to which such a predictor can be quantised, or 0."""
    return BITS if dims % GROUP_SIZE == 0 and rank % GROUP_SIZE == 0 else 0


def wider_rank(dims: int, rank: int) -> int | None:
    """Half as much again; None where that cannot be quantised, or is nearly all of D.

    For layers in which `rank` names many neurons in vain. With WIDER_BITS it takes a
    sixth more memory.
    """
    wider = rank * 3 // 2
    return wider if possible_bits(dims, wider) and wider <= dims * 3 // 4 else None


def default_rank(index: int, layers: int, dims: int) -> int:
    """The paper's ranks for OPT-6.7B, scaled by width: D/32, D/4 in the last eighth.

    Never below 128, which narrow models need as much (measured on the demo model: a
    third less is read in vain than at 64), nor above D/2.
    """
    last = index >= layers - math.ceil(layers / 8)
    return min(max(dims // (4 if last else 32), 128), max(dims // 2, 1))
