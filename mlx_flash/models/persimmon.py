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
from mlx_lm.models.base import BaseModelArgs

from .decoder import (
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
        check_sizes("Persimmon", self, "hidden_act", ("relu2", "relu", "gelu"))
        read_rope("Persimmon", self)


def _layer_norm(args: ModelArgs, dims: int | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(dims or args.hidden_size, eps=args.layer_norm_eps)


class Attention(nn.Module):
    scores_in_pieces = True  # see layers/attention.py

    def __init__(self, args: ModelArgs):
        super().__init__()
        D = args.hidden_size
        self.n_heads = args.num_attention_heads
        self.head_dim = D // self.n_heads
        self.query_key_value = nn.Linear(D, 3 * D)
        self.dense = nn.Linear(D, D)
        self.qk_layernorm = args.qk_layernorm
        if self.qk_layernorm:
            self.q_layernorm = _layer_norm(args, self.head_dim)
            self.k_layernorm = _layer_norm(args, self.head_dim)
        rotary = int(self.head_dim * args.partial_rotary_factor)
        self.rope = make_rope(rotary, args)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        B, L, _ = x.shape
        # The projection holds for each head its query, key and value.
        fused = self.query_key_value(x).reshape(B, L, self.n_heads, 3, -1)
        queries, keys, values = fused.transpose(3, 0, 2, 1, 4)
        if self.qk_layernorm:
            queries, keys = self.q_layernorm(queries), self.k_layernorm(keys)
        return self.dense(attend(queries, keys, values, mask, cache, self.rope))


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.self_attn = Attention(args)
        self.mlp = MLP(args.hidden_size, args.intermediate_size, args.hidden_act)
        self.input_layernorm = _layer_norm(args)
        self.post_attention_layernorm = _layer_norm(args)

    def __call__(self, h: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        h = h + self.self_attn(self.input_layernorm(h), mask, cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class PersimmonModel(Decoder):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]
        self.final_layernorm = _layer_norm(args)


class Model(CausalModel):
    def __init__(self, args: ModelArgs):
        super().__init__(args, args.hidden_size, model=PersimmonModel(args))
