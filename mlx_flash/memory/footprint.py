"""How much memory a model needs while it runs, found without computing anything.

MLX is lazy: a forward pass that is never evaluated costs no memory and no reads, yet
every array in it has its shape. That holds for any cache of any mlx-lm model, where
reading sizes from config.json would need to know each of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..arrays import arrays_of
from ..storage.manifest import Layer, Manifest
from ..storage.safetensors import DTYPES
from .allocation import spare_bytes

EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
KV_STEP = 64  # tokens by which `generation` lets the KV cache grow
MIN_PREFILL, MAX_PREFILL = 8, 512  # tokens of a prompt chunk
PREFILL_SHARE = 0.03  # of the budget, for the activations of a prompt chunk
GATHERED = 0.5  # of one layer's slots may be copied, when rows are gathered
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


def find_shapes(model: nn.Module, config: dict[str, Any]) -> Shapes:
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
        state = arrays_of([entry.state for entry in cache])
        sizes.append(sum(array.nbytes for array in state.values()))
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


def _experts_per_token(config: dict[str, Any]) -> int:
    """The number under whichever name a model gives it; 8 if it hides it.

    By exact names: `index_topk` counts tokens, and `top_k` belongs to sampling.
    """
    for key in EXPERTS_PER_TOKEN:
        value = config.get(key)
        if type(value) is int and value > 0:
            return value
    return 8


class Needs(Protocol):
    """What a unit kind says of memory; see `layers.kinds.UnitKind`."""

    def least_slots(self, units: int) -> int: ...

    def hidden_bytes(
        self, layers: Sequence[Layer], value_bytes: int, experts_per_token: int
    ) -> int: ...


@dataclass(frozen=True)
class Footprint:
    """What a model takes in memory besides its slots, for `context` tokens.

    Attributes:
        manifest, shapes: Of the model.
        needs: Its unit kind.
        context: Tokens of KV cache.
    """

    manifest: Manifest
    shapes: Shapes
    needs: Needs
    context: int

    @property
    def kv_bytes(self) -> int:
        tokens = -(-self.context // KV_STEP) * KV_STEP
        per_token = self.shapes.kv_bytes_per_token
        return int(self.shapes.kv_bytes_fixed + tokens * per_token)

    @property
    def fixed_bytes(self) -> int:
        """What is there whatever memory is given: weights, predictors, KV cache."""
        manifest = self.manifest
        return manifest.resident.bytes + manifest.predictor_bytes + self.kv_bytes

    @property
    def logits_bytes(self) -> int:
        return 4 * self.shapes.vocabulary * 4

    @property
    def page_bytes(self) -> int:
        """What slots take beyond their units, to begin on pages."""
        layers = self.manifest.layers
        return sum(spare_bytes(p.bytes) for layer in layers for p in layer.parts)

    @property
    def per_token_bytes(self) -> int:
        """What one token of a prompt chunk occupies while a layer is computed.

        Hidden values as the unit kind has them; a dozen vectors of the model's width;
        and attention scores (which only MLX's CPU backend keeps).
        """
        size, shapes = DTYPES[self.manifest.dtype][1], self.shapes
        hidden = self.needs.hidden_bytes(
            self.manifest.layers, size, shapes.experts_per_token
        )
        return hidden + 12 * shapes.width * size + shapes.heads * self.context * 4

    @property
    def least_slots(self) -> tuple[int, ...]:
        return tuple(self.needs.least_slots(x.units) for x in self.manifest.layers)

    @property
    def least_bytes(self) -> int:
        """The smallest budget that works."""
        layers = self.manifest.layers
        # One unit more of each layer makes up for rounding down in `make_budget`.
        share = max(
            (least + 1) / layer.units
            for least, layer in zip(self.least_slots, layers, strict=True)
        )
        need: float = self.fixed_bytes + self.page_bytes + self.logits_bytes
        need += share * self.manifest.ffn_bytes * (1 + GATHERED / len(layers))
        workspace = MIN_PREFILL * self.per_token_bytes
        return int(max(need + workspace, need / (1 - PREFILL_SHARE)))

    @property
    def most_bytes(self) -> int:
        """The budget beyond which more memory changes nothing."""
        everything = self.fixed_bytes + self.manifest.ffn_bytes + self.page_bytes
        return everything + self.logits_bytes + MAX_PREFILL * self.per_token_bytes
