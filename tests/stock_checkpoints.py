"""Tiny random checkpoints of mlx-lm's own mixture-of-experts models, and their runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes

import mlx_flash
from mlx_flash import sizing as loader
from mlx_flash.memory.beside import least_beside
from mlx_flash.memory.budget import make_budget

COMMON = dict(
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=97,
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
    head_dim=32,
    norm_topk_prob=True,
)

# Experts of two matrices and a squared ReLU, beside a state space and attention
NEMOTRON = COMMON | dict(
    model_type="nemotron_h",
    hybrid_override_pattern=["M", "E", "*", "E"],
    attention_bias=False,
    mamba_num_heads=4,
    mamba_head_dim=16,
    mamba_proj_bias=False,
    ssm_state_size=16,
    conv_kernel=4,
    n_groups=1,
    mlp_bias=False,
    layer_norm_epsilon=1e-5,
    use_bias=False,
    use_conv_bias=True,
    head_dim=32,
    moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=64,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
)

# Its experts take a vector of half the model's width, its router the whole one.
NEMOTRON_LATENT = NEMOTRON | dict(moe_latent_size=32)

# Its router also names four experts that have no weights: ids beyond the switch's.
LONGCAT = COMMON | dict(
    model_type="longcat_flash",
    attention_method="MLA",
    zero_expert_type="identity",
    zero_expert_num=4,
    n_routed_experts=8,
    moe_topk=3,
    ffn_hidden_size=64,
    expert_ffn_hidden_size=64,
    num_layers=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_rope_head_dim=16,
    qk_nope_head_dim=16,
    v_head_dim=16,
    routed_scaling_factor=1.0,
    mla_scale_q_lora=True,
    mla_scale_kv_lora=True,
    attention_bias=False,
)

# Keeps what it computed from its weights when it ran for the first time
KIMI_K3 = dict(
    model_type="kimi_k3",
    text_config=COMMON
    | dict(
        num_key_value_heads=4,
        linear_attn_config=dict(
            kda_layers=[1],
            full_attn_layers=[2],
            num_heads=4,
            head_dim=32,
            short_conv_kernel_size=4,
        ),
        attn_res_block_size=2,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        num_experts=8,
        num_experts_per_token=2,
        moe_intermediate_size=64,
    ),
)

MAMBA = dict(
    model_type="mamba",
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    state_size=8,
    num_hidden_layers=2,
    conv_kernel=4,
    use_bias=False,
    use_conv_bias=True,
    time_step_rank=4,
)
LLAMA = COMMON | dict(model_type="llama")


def make_weights(config: dict, seed: int = 1, dtype=mx.float32) -> nn.Module:
    """A model with random weights that all matter."""
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.random.seed(seed)

    def draw(array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        noise = 0.15 * mx.random.normal(array.shape)
        return (noise + (1.0 if array.ndim == 1 else 0.0)).astype(dtype)

    model.apply(draw)
    return model


def save(folder: Path, config: dict, *shards: dict[str, mx.array]) -> Path:
    """Write config.json and the shards, with an index if there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), shards[0])
        return folder
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        mx.save_safetensors(str(folder / name), shard)
        weight_map |= dict.fromkeys(shard, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_checkpoint(
    folder: Path, config: dict, quantize: dict | None = None, dtype=mx.float32, seed=1
) -> Path:
    """Write a stock mlx-lm folder with random weights."""
    model = make_weights(config, seed, dtype)
    if quantize:
        nn.quantize(model, **quantize)
        config = config | {"quantization": quantize}
    return save(folder, config, dict(tree_flatten(model.parameters())))


def write_original(folder: Path, config: dict, seed: int = 1) -> Path:
    """As the hub has it before mlx-lm: every expert's matrices are tensors of their
    own, `mlp.experts.0.gate_proj.weight`."""
    weights = {}
    for name, array in tree_flatten(make_weights(config, seed).parameters()):
        if ".switch_mlp." in name:
            for i, expert in enumerate(array):
                weights[name.replace(".switch_mlp.", f".experts.{i}.")] = expert
        else:
            weights[name] = array
    return save(folder, config, weights)


def stream(folder: Path, *slots: int, **options):
    """The model with so many slots for every layer, or for each.

    What is on flash beside the layers has its least slots.
    """

    def exactly(*args):
        budget, manifest = make_budget(*args), args[1].manifest
        counts = slots if len(slots) > 1 else slots * len(budget.slots)
        few = least_beside(manifest)
        return dataclasses.replace(budget, slots=counts, beside_slots=few)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "make_budget", exactly)
        options = {"page_cache": True} | options
        return mlx_flash.load_model(folder, "1GB", **options)[0]


def run(model: nn.Module, batch: int, prompt: int = 40) -> list[np.ndarray]:
    """Logits of a prompt without a cache, with one, and of four more tokens."""
    rng = np.random.default_rng(batch)
    tokens = mx.array(rng.integers(3, 97, (batch, prompt + 4)))
    cache = make_prompt_cache(model)
    outputs = [model(tokens)]
    for step in mx.split(tokens, range(prompt, prompt + 4), axis=1):
        outputs.append(model(step, cache=cache))
        mx.eval(outputs[-1])
    return [np.array(y.astype(mx.float32)) for y in outputs]


def assert_same(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Bit for bit, and of something worth comparing."""
    for a, e in zip(actual, expected, strict=True):
        assert np.isfinite(e).all() and np.ptp(e) > 0
        assert np.array_equal(a, e), f"differs by {np.abs(a - e).max()}"
