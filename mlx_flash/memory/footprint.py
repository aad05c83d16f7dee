"""How much memory a model needs while it runs, found without computing anything.

MLX is lazy: a forward pass that is never evaluated costs no memory and no reads, yet
every array in it has its shape. That holds for any cache of any mlx-lm model, where
reading sizes from config.json would need to know each of them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ..arrays import arrays_of
from ..storage.manifest import Layer, Manifest
from ..storage.safetensors import DTYPES
from .allocation import spare_bytes
from .beside import bytes_beside, least_beside, more_beside

EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
KV_STEP = 64  # tokens by which `generation` lets the KV cache grow
MIN_PREFILL, MAX_PREFILL = 8, 2048  # tokens of a prompt chunk; mlx-lm takes 2048
# Tokens that an FFN multiplies at once: more make a matrix product hardly faster.
MAX_BATCH = 256
# Of one token at a time: its logits, their log probabilities, and what these are of.
LOGITS = 4
# Freed buffers that MLX may keep, as a share of what is in use beside slots.
CACHED = 1 / 3
# Attention scores that are computed at once where MLX keeps them, and how many times
# that is in use: MLX runs ahead of what it computes, 3.9 times by what was measured.
SCORES_BYTES, LEAST_ROWS = 1 << 20, 8
SCORES_AT_ONCE = 4
NEAR, FAR = 256, 512  # multiples of the step by which mlx-lm's caches grow


@dataclass(frozen=True)
class Shapes:
    """What a model's size in memory depends on besides its weights.

    Attributes:
        kv_bytes_per_token, kv_bytes_fixed: Of its caches.
        vocabulary, width, heads: Logits, hidden values and attention scores of a token.
        widest: The most values that a layer beside the FFNs on flash has of a token.
        experts_per_token: Of a mixture of experts.
        scores_in_pieces: Whether attention goes in pieces where scores are kept, as
            `layers.attention` has it.
        masks: Whether what tokens may see is an array of bool, as windows have it.
    """

    kv_bytes_per_token: float
    kv_bytes_fixed: int
    vocabulary: int
    width: int
    heads: int
    widest: int = 0
    experts_per_token: int = 1
    scores_in_pieces: bool = False
    masks: bool = False


def rows_of_scores(heads: int, seen: int) -> int:
    """Rows of attention scores, of `seen` float32 a head, to be computed at once."""
    return max(SCORES_BYTES // (4 * heads * seen), LEAST_ROWS)


def find_shapes(
    model: nn.Module, config: dict[str, Any], on_flash: Collection[str] = ()
) -> Shapes:
    """Run `model`, whose weights need not be loaded, on prompts of two lengths.

    The caches have the dtype of the model's weights as they are now.

    Args:
        on_flash: The paths of the FFNs that go to flash.
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
        widest=_widest(model, logits.shape[-1], on_flash),
        experts_per_token=_experts_per_token(text),
        masks=any(type(entry) is not KVCache for entry in cache),
    )


def _widest(model: nn.Module, vocabulary: int, on_flash: Collection[str]) -> int:
    """The widest output of a linear layer, but for logits and FFNs on flash."""
    linear = nn.Linear | nn.QuantizedLinear
    widths = [
        len(module.weight)
        for path, module in model.named_modules()
        if isinstance(module, linear)
        and not any(path.startswith(f"{ffn}.") for ffn in on_flash)
    ]
    return max((n for n in widths if n != vocabulary), default=0)


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

    gathered: float

    def least_slots(self, units: int) -> int: ...

    def hidden_bytes(
        self,
        layers: Sequence[Layer],
        value_bytes: int,
        experts_per_token: int,
        share: float,
    ) -> int: ...

    def token_bytes(
        self, layers: Sequence[Layer], value_bytes: int, shapes: Shapes
    ) -> int: ...


@dataclass(frozen=True)
class Footprint:
    """What a model takes in memory besides its slots, for `context` tokens.

    Attributes:
        manifest, shapes: Of the model.
        needs: Its unit kind.
        context: Tokens of KV cache.
        share: Of a layer's units, the most that have slots.
        logits: Of so many tokens there is room for logits, in float32.
        adapter_bytes: Of weights that are resident beside the manifest's.
        dense: The unit kind of the manifest's blocks, if it has any.
    """

    manifest: Manifest
    shapes: Shapes
    needs: Needs
    context: int
    share: float = 1.0
    logits: int = LOGITS
    adapter_bytes: int = 0
    dense: Needs | None = None

    @property
    def kv_bytes(self) -> int:
        tokens = -(-self.context // KV_STEP) * KV_STEP
        per_token = self.shapes.kv_bytes_per_token
        return int(self.shapes.kv_bytes_fixed + tokens * per_token)

    @property
    def fixed_bytes(self) -> int:
        """What is there whatever memory is given: weights, predictors, KV cache.

        With the least slots of what is on flash beside the layers.
        """
        manifest = self.manifest
        weights = manifest.resident.bytes + manifest.predictor_bytes
        beside = bytes_beside(manifest, least_beside(manifest))
        return weights + beside + self.adapter_bytes + self.kv_bytes

    @property
    def logits_bytes(self) -> int:
        return self.logits * self.shapes.vocabulary * 4

    @property
    def page_bytes(self) -> int:
        """What slots take beyond their units, to begin on pages."""
        layers = self.manifest.layers
        return sum(spare_bytes(p.bytes) for layer in layers for p in layer.parts)

    @property
    def _value_bytes(self) -> int:
        return DTYPES[self.manifest.dtype][1]

    @property
    def hidden_bytes(self) -> int:
        """What one token occupies while an FFN multiplies it."""
        experts, layers = self.shapes.experts_per_token, self.manifest.layers
        size, share = self._value_bytes, self.share
        hidden = self.needs.hidden_bytes(layers, size, experts, share)
        if self.dense is not None and (blocks := self.manifest.blocks):
            hidden = max(hidden, self.dense.hidden_bytes(blocks, size, experts, 1.0))
        return hidden

    @property
    def per_token_bytes(self) -> int:
        """What one token of a prompt chunk occupies all the time.

        A dozen vectors of the model's width, or fewer and wider ones in a layer that
        stays resident; and what the unit kind keeps of a token.
        """
        size, shapes = self._value_bytes, self.shapes
        kept = self.needs.token_bytes(self.manifest.layers, size, shapes)
        vectors = max(12 * shapes.width, 6 * shapes.width + 4 * shapes.widest)
        return kept + vectors * size

    def scores_bytes(self, tokens: int) -> int:
        """Attention scores of a chunk, which only MLX's CPU backend keeps."""
        if mx.default_device() == mx.gpu:
            return 0
        heads, context = self.shapes.heads, self.context
        whole = tokens * heads * context * 4
        if not self.shapes.scores_in_pieces:
            return whole
        rows = rows_of_scores(heads, context)
        masks = tokens * context if self.shapes.masks else 0
        return min(whole, SCORES_AT_ONCE * rows * heads * context * 4 + masks)

    def chunk(self, room: float) -> tuple[int, int]:
        """(tokens of a chunk, tokens that an FFN multiplies at once) for `room` bytes.

        Never less than MIN_PREFILL of both, whatever they take.
        """
        hidden = self.hidden_bytes
        batch = int(min(max(room / 2 / hidden, MIN_PREFILL), MAX_BATCH))
        low, high = MIN_PREFILL, MAX_PREFILL + 1
        while high - low > 1:  # scores do not grow as tokens do
            tokens = (low + high) // 2
            in_use = tokens * self.per_token_bytes + self.scores_bytes(tokens)
            if in_use <= room - batch * hidden:
                low = tokens
            else:
                high = tokens
        return low, min(batch, low)

    @property
    def logits_pay(self) -> bool:
        """Whether a token's logits are less than what they are computed from.

        Lazy logits hold that: the last layer's input and output, and their sum.
        """
        return self.shapes.vocabulary * 4 < 4 * self.shapes.width * self._value_bytes

    def workspace_bytes(self, tokens: int, batch: int, waiting: int = 0) -> int:
        """What is in use beside weights, KV cache and slots, and buffers kept from it.

        Args:
            tokens: Of a prompt chunk.
            batch: Tokens that an FFN multiplies at once.
            waiting: Tokens of a call whose logits wait for those of its other chunks.
        """
        in_use = self.logits_bytes + tokens * self.per_token_bytes
        in_use += self.scores_bytes(tokens) + batch * self.hidden_bytes
        size = self._value_bytes * self.shapes.width
        waits = self.shapes.vocabulary * 4 if self.logits_pay else 4 * size
        grows = self.growth_bytes(self.kv_bytes)
        return int((1 + CACHED) * in_use) + waiting * waits + grows

    def growth_bytes(self, kv_bytes: int) -> int:
        """What is there twice while a KV cache grows: one layer of it."""
        return kv_bytes // len(self.manifest.layers)

    @property
    def gathered_share(self) -> float:
        """Of the largest layer's slots, what may be copied to gather rows."""
        return (1 + CACHED) * self.needs.gathered

    @property
    def least_slots(self) -> tuple[int, ...]:
        return tuple(self.needs.least_slots(x.units) for x in self.manifest.layers)

    @property
    def most_bytes(self) -> int:
        """The budget beyond which more memory changes nothing."""
        everything = self.fixed_bytes + self.manifest.ffn_bytes + self.page_bytes
        everything += more_beside(self.manifest)
        return everything + self.workspace_bytes(MAX_PREFILL, MAX_BATCH)
