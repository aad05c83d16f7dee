"""How much memory a model needs while it runs, found without computing anything.

MLX is lazy: a forward pass that is never evaluated costs no memory and no reads, yet
every array in it has its shape. That holds for any cache of any mlx-lm model, where
reading sizes from config.json would need to know each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
NEAR, FAR = 256, 512  # multiples of the step by which mlx-lm's caches grow


@dataclass(frozen=True)
class Shapes:
    """What a model's size in memory depends on besides its weights.

    Attributes:
        kv_bytes_per_token, kv_bytes_fixed: Of its caches.
        vocabulary, width, heads: Logits, hidden values and attention scores of a token.
        experts_per_token: Of a mixture of experts.
    """

    kv_bytes_per_token: float
    kv_bytes_fixed: int
    vocabulary: int
    width: int
    heads: int
    experts_per_token: int = 1


def find_shapes(model: nn.Module, config: dict) -> Shapes:
    """Run `model`, whose weights need not be loaded, on prompts of two lengths.

    The caches have the dtype of the model's weights as they are now.
    """
    positions = config.get("max_position_embeddings") or FAR
    lengths = (NEAR, FAR) if positions >= FAR else (positions // 2, positions)
    sizes = []
    for tokens in lengths:
        cache = make_prompt_cache(model)
        for entry in cache:
            if hasattr(entry, "step"):
                entry.step = 1  # count what is used, not what is allocated ahead
        logits = model(mx.zeros((1, tokens), mx.int32), cache=cache)
        state = tree_flatten([entry.state for entry in cache])
        sizes.append(sum(a.nbytes for _, a in state if isinstance(a, mx.array)))
    slope = (sizes[1] - sizes[0]) / (lengths[1] - lengths[0])
    text = config | (config.get("text_config") or {})
    return Shapes(
        kv_bytes_per_token=slope,
        kv_bytes_fixed=int(max(sizes[0] - slope * lengths[0], 0)),
        vocabulary=logits.shape[-1],
        width=text.get("hidden_size") or 4096,
        heads=text.get("num_attention_heads") or 32,
        experts_per_token=_experts_per_token(text),
    )


def _experts_per_token(config: dict) -> int:
    """The number under whichever name a model gives it; 8 if it hides it.

    By exact names: `index_topk` counts tokens, and `top_k` belongs to sampling.
    """
    for key in EXPERTS_PER_TOKEN:
        value = config.get(key)
        if type(value) is int and value > 0:
            return value
    return 8
