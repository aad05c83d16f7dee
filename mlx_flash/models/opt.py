"""OPT (`facebook/opt-*`), which mlx-lm does not have.

A decoder of the GPT kind with two habits of its own: positions are learned and start
in row 2 of their table, and the FFN is a plain ReLU layer, so most of its neurons are
exactly zero. Modules carry the checkpoint's names, except that `fc1` and `fc2` live in
an `mlp` module, which a streaming layer can then replace.
Shapes: B batch, L tokens, D model width.
"""

import re
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.cache import BatchKVCache

from .decoder import ACTIVATIONS, CausalModel, Decoder, attend, check_sizes, run_layers

# Rows 0 and 1 of the position table were fairseq's padding; no token uses them.
POSITION_OFFSET = 2


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str = "opt"
    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    activation_function: str = "relu"
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    word_embed_proj_dim: int = 0  # missing or null: hidden_size
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self):
        if not self.word_embed_proj_dim:
            self.word_embed_proj_dim = self.hidden_size
        # The OPT models use relu; gelu is what Galactica, the same network, uses.
        check_sizes("OPT", self, "activation_function", ("relu", "gelu"))


def _layer_norm(args: ModelArgs) -> nn.LayerNorm:
    return nn.LayerNorm(args.hidden_size, affine=args.layer_norm_elementwise_affine)


class Attention(nn.Module):
    scores_in_pieces = True  # see layers/attention.py

    def __init__(self, args: ModelArgs):
        super().__init__()
        D = args.hidden_size
        self.n_heads = args.num_attention_heads
        self.q_proj = nn.Linear(D, D, bias=args.enable_bias)
        self.k_proj = nn.Linear(D, D, bias=args.enable_bias)
        self.v_proj = nn.Linear(D, D, bias=args.enable_bias)
        self.out_proj = nn.Linear(D, D, bias=args.enable_bias)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        B, L, _ = x.shape

        def heads(y):
            return y.reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3)

        queries = heads(self.q_proj(x))
        keys, values = heads(self.k_proj(x)), heads(self.v_proj(x))
        return self.out_proj(attend(queries, keys, values, mask, cache))


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.fc1 = nn.Linear(args.hidden_size, args.ffn_dim, bias=args.enable_bias)
        self.fc2 = nn.Linear(args.ffn_dim, args.hidden_size, bias=args.enable_bias)
        self.activation = ACTIVATIONS[args.activation_function]

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.activation(self.fc1(x)))


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.norm_first = args.do_layer_norm_before
        self.self_attn = Attention(args)
        self.self_attn_layer_norm = _layer_norm(args)
        self.mlp = MLP(args)
        self.final_layer_norm = _layer_norm(args)

    def __call__(self, h: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if self.norm_first:
            h = h + self.self_attn(self.self_attn_layer_norm(h), mask, cache)
            return h + self.mlp(self.final_layer_norm(h))
        # opt-350m alone normalises after the residual is added.
        h = self.self_attn_layer_norm(h + self.self_attn(h, mask, cache))
        return self.final_layer_norm(h + self.mlp(h))


class OPTDecoder(Decoder):
    def __init__(self, args: ModelArgs):
        super().__init__()
        D, E = args.hidden_size, args.word_embed_proj_dim
        self.max_positions = args.max_position_embeddings
        self.embed_tokens = nn.Embedding(args.vocab_size, E)
        self.embed_positions = nn.Embedding(self.max_positions + POSITION_OFFSET, D)
        self.project_in = nn.Linear(E, D, bias=False) if E != D else None
        self.project_out = nn.Linear(D, E, bias=False) if E != D else None
        self.layers = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]
        has_final = args.do_layer_norm_before and not args._remove_final_layer_norm
        self.final_layer_norm = _layer_norm(args) if has_final else None

    def _positions(self, L: int, cache: Any) -> mx.array:
        """Rows of the position table for the next L tokens: [L], or [B, L]."""
        offset = 0 if cache is None else cache.offset
        if not isinstance(offset, mx.array):
            self._check_end(offset + L)
            return mx.arange(offset, offset + L) + POSITION_OFFSET

        # In a batch each row has its own offset, and reading it would make the host
        # wait for the device on every token. The width of a BatchKVCache is known to
        # the host and no row is longer, so the offsets are read only once a batch is
        # as wide as the table. Other batched caches bound nothing and are always read.
        width = cache.size() if isinstance(cache, BatchKVCache) else self.max_positions
        if width + L > self.max_positions:
            ends: Any = _row_ends(cache, L).max().item()  # its hint allows complex
            self._check_end(ends)
        positions = offset[:, None] + mx.arange(L)
        # Padding lies before 0 or, on the right, perhaps beyond the table. It is masked
        # later, but must not read out of bounds: 0 * NaN would reach real tokens.
        return mx.clip(positions, 0, self.max_positions - 1) + POSITION_OFFSET

    def _check_end(self, end: int):
        if end > self.max_positions:
            raise ValueError(
                f"This OPT model has positions for {self.max_positions} tokens, and "
                f"{end} were asked for. Shorten the prompt or generate fewer tokens."
            )

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        if self.project_in is not None:
            h = self.project_in(h)
        first = cache[0] if cache else None
        h = h + self.embed_positions(self._positions(h.shape[1], first))
        h = run_layers(self.layers, h, cache)
        if self.final_layer_norm is not None:
            h = self.final_layer_norm(h)
        return h if self.project_out is None else self.project_out(h)


def _row_ends(cache: Any, L: int) -> mx.array:
    """Tokens each row of a batch will hold after the next L, right padding left out.

    While mlx-lm reads prompts of unequal length, they are padded on the right and
    only the cache knows by how much. In a chunk before the last this gives less than
    the truth; the last chunk is exact, so no prompt that is too long gets through.
    """
    ends = cache.offset + L
    if (padding := getattr(cache, "_right_padding", None)) is not None:
        ends = ends - padding  # BatchKVCache
    if (lengths := getattr(cache, "_lengths", None)) is not None:
        ends = mx.minimum(ends, lengths)  # BatchRotatingKVCache
    return ends


class OPTModel(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.decoder = OPTDecoder(args)


class Model(CausalModel):
    def __init__(self, args: ModelArgs):
        super().__init__(args, args.word_embed_proj_dim, model=OPTModel(args))

    @property
    def decoder(self) -> Decoder:
        return self.model.decoder

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Checkpoint names to module names; names already right stay as they are."""
        renamed = {}
        for name, weight in super().sanitize(weights).items():
            if name.startswith("decoder."):  # the first .bin files lack the prefix
                name = f"model.{name}"
            if name == "model.decoder.version":  # a fairseq marker, not a weight
                continue
            name = re.sub(r"(\.layers\.\d+)\.(fc[12])\.", r"\1.mlp.\2.", name)
            renamed[name] = weight
        return renamed
