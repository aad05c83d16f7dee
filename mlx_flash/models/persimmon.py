"""Persimmon (`adept/persimmon-8b-*`), which mlx-lm does not have.

A decoder of the GPT kind with squared ReLU, so that most neurons are exactly zero, with
layer norms over each head's query and key, and rotary positions on half of each head.
Modules carry the checkpoint's names.

The truth is transformers' modeling_persimmon (5.23); no released checkpoint was run.
Shapes: B batch, L tokens, D model width.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import (
    BaseModelArgs,
    create_attention_mask,
    scaled_dot_product_attention,
)
from mlx_lm.models.rope_utils import initialize_rope

from .falcon import check_rope

ACTIVATIONS = {"relu2": nn.relu2, "relu": nn.relu, "gelu": nn.gelu}


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str = "persimmon"
    vocab_size: int = 262144
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    hidden_act: str = "relu2"
    max_position_embeddings: int = 16384
    layer_norm_eps: float = 1e-5
    qk_layernorm: bool = True
    partial_rotary_factor: float = 0.5  # the released config.json leaves it out
    rope_theta: float = 25000.0
    rope_scaling: dict | None = None
    rope_parameters: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"Persimmon with hidden_act {self.hidden_act!r} is not supported; "
                f"known: {', '.join(ACTIVATIONS)}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} cannot be divided among "
                f"num_attention_heads {self.num_attention_heads}."
            )
        if self.rope_parameters:  # how transformers 5 writes the three above
            given = self.rope_parameters
            self.rope_theta = given.get("rope_theta", self.rope_theta)
            self.partial_rotary_factor = given.get(
                "partial_rotary_factor", self.partial_rotary_factor
            )
            self.rope_scaling = given
        check_rope("Persimmon", self.rope_scaling)


def _layer_norm(args: ModelArgs, dims: int | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(dims or args.hidden_size, eps=args.layer_norm_eps)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        D = args.hidden_size
        self.n_heads = args.num_attention_heads
        self.head_dim = D // self.n_heads
        self.scale = self.head_dim**-0.5
        self.query_key_value = nn.Linear(D, 3 * D)
        self.dense = nn.Linear(D, D)
        self.qk_layernorm = args.qk_layernorm
        if self.qk_layernorm:
            self.q_layernorm = _layer_norm(args, self.head_dim)
            self.k_layernorm = _layer_norm(args, self.head_dim)
        self.rope = initialize_rope(
            int(self.head_dim * args.partial_rotary_factor),
            args.rope_theta,
            False,
            args.rope_scaling,
            args.max_position_embeddings,
        )

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        B, L, D = x.shape
        # The projection holds for each head its query, key and value.
        fused = self.query_key_value(x).reshape(B, L, self.n_heads, 3, -1)
        queries, keys, values = fused.transpose(3, 0, 2, 1, 4)
        if self.qk_layernorm:
            queries, keys = self.q_layernorm(queries), self.k_layernorm(keys)
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset), self.rope(keys, offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        out = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
        )
        return self.dense(out.transpose(0, 2, 1, 3).reshape(B, L, D))


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        D, N = args.hidden_size, args.intermediate_size
        self.dense_h_to_4h = nn.Linear(D, N)
        self.dense_4h_to_h = nn.Linear(N, D)
        self.activation = ACTIVATIONS[args.hidden_act]

    def __call__(self, x: mx.array) -> mx.array:
        return self.dense_4h_to_h(self.activation(self.dense_h_to_4h(x)))


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.self_attn = Attention(args)
        self.mlp = MLP(args)
        self.input_layernorm = _layer_norm(args)
        self.post_attention_layernorm = _layer_norm(args)

    def __call__(self, h: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        h = h + self.self_attn(self.input_layernorm(h), mask, cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class PersimmonModel(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]
        self.final_layernorm = _layer_norm(args)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        if cache is None:
            cache = [None] * len(self.layers)

        mask = create_attention_mask(h, cache[0])
        for layer, c in zip(self.layers, cache, strict=True):
            h = layer(h, mask, cache=c)
        return self.final_layernorm(h)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = PersimmonModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        out = self.model(inputs, cache, input_embeddings)
        if self.args.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(out)
        return self.lm_head(out)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Leave out the copy of a tied head, and rotary tables of old checkpoints."""
        tied = self.args.tie_word_embeddings
        return {
            name: weight
            for name, weight in weights.items()
            if not name.endswith(".inv_freq")
            and not (tied and name.startswith("lm_head."))
        }

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.layers
