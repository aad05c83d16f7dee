"""Tiny random checkpoints of mlx-lm's own mixture-of-experts models."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

COMMON = dict(
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=100,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
)

QWEN3 = COMMON | dict(
    model_type="qwen3_moe",
    num_experts=8,
    num_experts_per_tok=3,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    moe_intermediate_size=96,
    head_dim=16,
    norm_topk_prob=True,
)


def write_checkpoint(
    folder: Path, config: dict, quantize: dict | None = None, dtype=mx.float32
) -> Path:
    """Write a stock mlx-lm folder with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.random.seed(1)

    def draw(array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        noise = 0.15 * mx.random.normal(array.shape)
        return (noise + (1.0 if array.ndim == 1 else 0.0)).astype(dtype)

    model.apply(draw)
    if quantize:
        nn.quantize(model, **quantize)
        config = config | {"quantization": quantize}
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
