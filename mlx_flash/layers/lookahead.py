"""Which experts the next layer will probably choose, judged by this layer's input.

The residual stream changes slowly from layer to layer: the next layer's own router,
given what this layer's experts are given, mostly names the experts that it will name
when its turn comes. They are read while this layer computes; a wrong guess costs
bandwidth and nothing else.
Shapes: T tokens, K experts of each token, E experts, D model width.
"""

import mlx.core as mx
import mlx.nn as nn

from .base import Guess


def router_guess(block: nn.Module, experts: int, dims: int) -> Guess | None:
    """A function (x [..., D], K) → expert ids [..., K] of a mixture-of-experts block.

    Args:
        block: The module that holds the router beside the experts.
        experts: E.
        dims: D.

    Returns:
        None where the block has no router that could be understood: one that gives
        scores [..., E], or the ids themselves, for x alone.
    """
    router = getattr(block, "gate", getattr(block, "router", None))
    if router is None:
        return None

    def guess(x: mx.array, top_k: int) -> mx.array:
        out = router(x)
        for array in out if isinstance(out, tuple) else (out,):
            if not mx.issubdtype(array.dtype, mx.floating):
                return array
        scores = out[0] if isinstance(out, tuple) else out
        if scores.shape[-1] != experts:
            raise ValueError("no scores of all experts")
        return mx.argpartition(-scores, top_k - 1, axis=-1)[..., :top_k]

    try:
        ids = guess(mx.zeros((1, 1, dims)), 1)  # lazy: only shapes are found out
    except Exception:  # whatever a router of another kind raises: it is not used
        return None
    return guess if ids.ndim == 3 else None
