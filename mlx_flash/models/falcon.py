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
from mlx_lm.models.base import BaseModelArgs

from .decoder import (
    ACTIVATIONS,
    MLP,
    CausalModel,
    Decoder,
    attend,
    check_sizes,
    make_rope,
    read_rope,
)


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
        check_sizes("Falcon", self, "activation", tuple(ACTIVATIONS))
        if self.new_decoder_architecture:
            self._check_new_architecture()
        else:  # whatever config.json says
            self.num_kv_heads = 1 if self.multi_query else self.num_attention_heads
            self.num_ln_in_parallel_attn = 1
        if not self.ffn_hidden_size:
            self.ffn_hidden_size = 4 * self.hidden_size
        read_rope("Falcon", self)

    def _check_new_architecture(self):
        self.parallel_attn = True  # always so there, whatever config.json says
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_attention_heads
        if self.num_kv_heads < 1 or self.num_attention_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} cannot be grouped "
                f"over num_kv_heads {self.num_kv_heads}."
            )
        if self.num_ln_in_parallel_attn is None:
            self.num_ln_in_parallel_attn = 2
        if self.num_ln_in_parallel_attn not in (1, 2):
            raise ValueError(
                f"num_ln_in_parallel_attn cannot be {self.num_ln_in_parallel_attn}, "
                "only 1 or 2."
            )


def _layer_norm(args: ModelArgs) -> nn.LayerNorm:
    return nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)


class Attention(nn.Module):
    scores_in_pieces = True  # see layers/attention.py

    def __init__(self, args: ModelArgs):
        super().__init__()
        D = args.hidden_size
        assert args.num_kv_heads is not None  # ModelArgs sets it
        self.n_heads = args.num_attention_heads
        self.n_kv_heads = args.num_kv_heads
        self.head_dim = D // self.n_heads
        fused = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        self.query_key_value = nn.Linear(D, fused, bias=args.bias)
        self.dense = nn.Linear(D, D, bias=args.bias)
        self.rope = make_rope(self.head_dim, args)

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
        queries, keys, values = self._split(self.query_key_value(x))
        return self.dense(attend(queries, keys, values, mask, cache, self.rope))


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.parallel = args.parallel_attn
        self.two_norms = args.num_ln_in_parallel_attn == 2
        self.self_attention = Attention(args)
        self.mlp = MLP(
            args.hidden_size, args.ffn_hidden_size, args.activation, args.bias
        )
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


class FalconModel(Decoder):
    names = ("word_embeddings", "h", "ln_f")

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.word_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.h = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]
        self.ln_f = _layer_norm(args)


class Model(CausalModel):
    def __init__(self, args: ModelArgs):
        super().__init__(args, args.hidden_size, transformer=FalconModel(args))
