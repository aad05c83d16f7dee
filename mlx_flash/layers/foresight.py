"""What the input of an FFN tells of units to come, learned from text.

Two linear maps of the input of a mixture's layer: which experts the next layer will
choose for this token, and how soon each of the layer's own experts will be wanted again
by the tokens after it. The first says what to read early, the second what to keep. Both
are a small part of a router's size, and neither ever changes a result.
Shapes: T tokens, D model width, n units of the layer, m of the next one.
"""

import mlx.core as mx
import mlx.nn as nn

from ..arrays import parameters

BITS, GROUP_SIZE = 4, 64


class Foresight(nn.Module):
    """The maps of one layer. `ahead` is None for the last layer.

    A unit of the next layer is guessed where its score exceeds zero: the threshold is
    in the bias. What `keep` gives is on the scale of `policies.Foreseen`: the share of
    the next tokens that want a unit, the next token counting most, as far as LRFU's own
    sum does not tell it.
    """

    def __init__(self, dims: int, units: int, following: int | None):
        super().__init__()
        self.keep = nn.Linear(dims, units)
        self.ahead = None if following is None else nn.Linear(dims, following)
        if dims % GROUP_SIZE == 0:
            nn.quantize(self, group_size=GROUP_SIZE, bits=BITS)

    @property
    def nbytes(self) -> int:
        """What its arrays take."""
        return sum(array.nbytes for array in parameters(self).values())

    def next_scores(self, x: mx.array, per_token: int = 0) -> mx.array:
        """[T, m]: above zero where the next layer will probably choose a unit for x
        [T, D]."""
        assert self.ahead is not None
        return self.ahead(x.astype(mx.float32))

    def expected(self, x: mx.array) -> mx.array:
        """[n]: how soon units will be wanted after the last of x [T, D]."""
        return self.keep(x[-1:].astype(mx.float32))[0]
