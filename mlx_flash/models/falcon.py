"""Falcon (`tiiuae/falcon-*`), which mlx-lm does not have.

Three generations share the name. Falcon-7B has one key and value head, and feeds one
normed input to attention and FFN side by side. Falcon-40B and 11B group the key and
value heads (two norms, and one). The RW kind has a key and value for every head and
runs attention and FFN one after the other. All fuse query, key and value into one
projection, each in its own layout. Modules carry the checkpoint's names.

The truth is transformers' modeling_falcon (5.23); no released checkpoint was run. A
relufied model must say `"activation": "relu"`, for the activation is read from
config.json alone: where only the remote code of a checkpoint exchanges it, add that.
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

ACTIVATIONS = {"gelu": nn.gelu, "relu": nn.relu, "relu2": nn.relu2}

# Scalings that do not depend on the length: each row of a batch can have its own.
ROPE_TYPES = ("default", "linear")


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str = "falcon"
    vocab_size: int = 65024
    hidden_size: int = 4544
    num_hidden_layers: int = 32
    num_attention_heads: int = 71
    num_kv_heads: int | None = None
    num_ln_in_parallel_attn: int | None = None
    ffn_hidden_size: int = 0  # missing or null: four times hidden_size
    activation: str = "gelu"
    layer_norm_epsilon: float = 1e-5
    max_position_embeddings: int = 2048
    alibi: bool = False
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    rope_parameters: dict | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self):
        if self.alibi:
            raise ValueError(
                "Falcon with alibi (the falcon-rw models) is not supported, only "
                "rotary positions."
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"Falcon with activation {self.activation!r} is not supported; "
                f"known: {', '.join(ACTIVATIONS)}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} cannot be divided among "
                f"num_attention_heads {self.num_attention_heads}."
            )
        self._set_kv_heads()
        self._set_norms()
        if not self.ffn_hidden_size:
            self.ffn_hidden_size = 4 * self.hidden_size
        if self.rope_parameters:  # how transformers 5 writes the two above
            self.rope_theta = self.rope_parameters.get("rope_theta", self.rope_theta)
            self.rope_scaling = self.rope_parameters
        check_rope("Falcon", self.rope_scaling)

    def _set_kv_heads(self):
        """The number used: config.json decides in the new architecture only."""
        if not self.new_decoder_architecture:
            self.num_kv_heads = 1 if self.multi_query else self.num_attention_heads
        elif self.num_kv_heads is None:
            self.num_kv_heads = self.num_attention_heads
        elif self.num_kv_heads < 1 or self.num_attention_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} cannot be grouped "
                f"over num_kv_heads {self.num_kv_heads}."
            )

    def _set_norms(self):
        if not self.new_decoder_architecture:
            self.num_ln_in_parallel_attn = 1
            return
        self.parallel_attn = True  # always so there, whatever config.json says
        if self.num_ln_in_parallel_attn is None:
            self.num_ln_in_parallel_attn = 2
        if self.num_ln_in_parallel_attn not in (1, 2):
            raise ValueError(
                f"num_ln_in_parallel_attn cannot be {self.num_ln_in_parallel_attn}, "
                "only 1 or 2."
            )


def check_rope(name: str, scaling: dict | None) -> None:
    """Refuse a rotary scaling that was not compared with transformers."""
    scaling = scaling or {}
    kind = scaling.get("type") or scaling.get("rope_type") or "default"
    if kind == "linear" and not scaling.get("factor"):
        raise ValueError(f"{name}'s linear rotary scaling needs a factor: {scaling}.")
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"{name} with rotary scaling {kind!r} is not supported; "
            f"known: {', '.join(ROPE_TYPES)}."
        )


def _layer_norm(args: ModelArgs) -> nn.LayerNorm:
    return nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        D = args.hidden_size
        assert args.num_kv_heads is not None  # ModelArgs sets it
        self.n_heads = args.num_attention_heads
        self.n_kv_heads = args.num_kv_heads
        self.head_dim = D // self.n_heads
        self.scale = self.head_dim**-0.5
        fused = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        self.query_key_value = nn.Linear(D, fused, bias=args.bias)
        self.dense = nn.Linear(D, D, bias=args.bias)
        self.rope = initialize_rope(
            self.head_dim,
            args.rope_theta,
            False,
            args.rope_scaling,
            args.max_position_embeddings,
        )

    def _split(self, fused: mx.array) -> list[mx.array]:
        """Queries, keys and values, [B, heads, L, head_dim] each.

        The three layouts are one: for each key and value head its queries, then the
        key, then the value. Falcon-7B has one such group, RW as many as heads.
        """
        B, L, _ = fused.shape
        groups = fused.reshape(B, L, self.n_kv_heads, -1, self.head_dim)
        queries = groups[..., :-2, :].reshape(B, L, self.n_heads, self.head_dim)
        keys, values = groups[..., -2, :], groups[..., -1, :]
        return [y.transpose(0, 2, 1, 3) for y in (queries, keys, values)]

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        B, L, D = x.shape
        queries, keys, values = self._split(self.query_key_value(x))
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
        D, N = args.hidden_size, args.ffn_hidden_size
        self.dense_h_to_4h = nn.Linear(D, N, bias=args.bias)
        self.dense_4h_to_h = nn.Linear(N, D, bias=args.bias)
        self.activation = ACTIVATIONS[args.activation]

    def __call__(self, x: mx.array) -> mx.array:
        return self.dense_4h_to_h(self.activation(self.dense_h_to_4h(x)))


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.parallel = args.parallel_attn
        self.two_norms = args.num_ln_in_parallel_attn == 2
        self.self_attention = Attention(args)
        self.mlp = MLP(args)
        if self.two_norms:
            self.ln_attn = _layer_norm(args)
            self.ln_mlp = _layer_norm(args)
        else:
            self.input_layernorm = _layer_norm(args)
        if not self.parallel:
            self.post_attention_layernorm = _layer_norm(args)

    def __call__(self, h: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if not self.parallel:
            h = h + self.self_attention(self.input_layernorm(h), mask, cache)
            return h + self.mlp(self.post_attention_layernorm(h))
        if self.two_norms:
            x, y = self.ln_attn(h), self.ln_mlp(h)
        else:
            x = y = self.input_layernorm(h)
        return h + self.self_attention(x, mask, cache) + self.mlp(y)


class FalconModel(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.word_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.h = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]
        self.ln_f = _layer_norm(args)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        h = input_embeddings
        if h is None:
            h = self.word_embeddings(inputs)
        if cache is None:
            cache = [None] * len(self.h)

        mask = create_attention_mask(h, cache[0])
        for layer, c in zip(self.h, cache, strict=True):
            h = layer(h, mask, cache=c)
        return self.ln_f(h)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.transformer = FalconModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        out = self.transformer(inputs, cache, input_embeddings)
        if self.args.tie_word_embeddings:
            return self.transformer.word_embeddings.as_linear(out)
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
        return self.transformer.h
