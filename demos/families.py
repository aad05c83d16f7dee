"""Is every family of models the same from flash as it is in memory?

For each family a tiny checkpoint with random weights is written and loaded twice: by
mlx-lm as a whole, and by mlx-flash with slots for a quarter of a layer's experts or
neurons. Both read the same prompt and the same further tokens. Experts must give the
same bits; neurons are added up in another order, and must agree to 1e-4.
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as load_resident

import mlx_flash
from mlx_flash.assembly import assemble
from mlx_flash.budget import make_budget
from mlx_flash.models import get_model_classes

PROMPT, DECODED, VOCABULARY = 40, 3, 96  # 40 tokens × 2 experts: mlx-lm sorts from 64
NEURON_TOLERANCE = 1e-4  # of the largest logit
GOLDENS = Path(__file__).parents[1] / "tests" / "goldens"

# Every name that a family may give a size; a family takes the ones it knows.
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=64,
    moe_shared_expert_intermediate_size=64,
    shared_intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    norm_eps=1e-5,
    layernorm_epsilon=1e-5,
    layer_norm_epsilon=1e-5,
    rope_theta=1e4,
    partial_rotary_factor=0.5,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    use_bias=False,
    use_qk_norm=True,
    sliding_window=16,
    # experts and their router
    num_experts=8,
    num_local_experts=8,
    n_routed_experts=8,
    moe_num_experts=8,
    num_experts_per_tok=2,
    num_experts_per_token=2,
    moe_topk=2,
    moe_top_k=2,
    moe_k=2,
    n_shared_experts=1,
    num_shared_experts=1,
    num_shared_expert=1,
    moe_num_shared_experts=1,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    first_k_dense_replace=0,
    num_dense_layers=0,
    # latent attention
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_rope_head_dim=16,
    qk_nope_head_dim=16,
    v_head_dim=16,
    index_head_dim=32,
    index_n_heads=2,
    index_topk=16,
    # linear attention and state spaces
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    linear_conv_kernel_dim=4,
    full_attention_interval=2,
    layer_group_size=2,
    group_norm_size=2,
    mamba_d_conv=4,
    mamba_d_state=16,
    mamba_expand=2,
    mamba_n_heads=4,
    mamba_d_head=32,
    mamba_n_groups=1,
    mamba_proj_bias=False,
    mamba_conv_bias=True,
    mamba_num_heads=4,
    mamba_head_dim=32,
    ssm_state_size=16,
    conv_kernel=4,
    n_groups=1,
    use_conv_bias=True,
)
SLIDING = ["sliding_attention", "full_attention"]
LLAMA4 = dict(
    attention_chunk_size=32,
    interleave_moe_layer_step=1,
    intermediate_size_mlp=64,
    rope_scaling=None,
)

# What else a family asks for. `text` is put into `text_config`, with the sizes.
FAMILIES: dict[str, dict] = {
    "Klear": {},
    "afmoe": dict(layer_types=SLIDING),
    "bailing_hybrid": {},
    "bailing_moe": {},
    "bailing_moe_linear": {},
    "bailing_moe_v3": {},
    "deepseek": {},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "deepseek_v32": {},
    "deepseek_v41": {},
    "dots1": dict(scoring_func="noaux_tc"),
    "ernie4_5_moe": {},
    "exaone_moe": dict(layer_types=SLIDING, is_moe_layer=[False, True]),
    "gemma4_text": dict(
        enable_moe_block=True,
        top_k_experts=2,
        num_kv_shared_layers=0,
        global_head_dim=16,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=0,
        layer_types=SLIDING,
    ),
    "glm4_moe": dict(rope_scaling=None),
    "glm4_moe_lite": dict(num_key_value_heads=4),
    "glm_moe_dsa": dict(
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        moe_layer_freq=1,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
    ),
    "gpt_oss": dict(layer_types=SLIDING),
    "granitemoe": dict(
        logits_scaling=2.0,
        attention_multiplier=0.25,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
    ),
    "granitemoehybrid": dict(
        logits_scaling=2.0,
        attention_multiplier=0.25,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        layer_types=["mamba", "attention"],
    ),
    "hunyuan": dict(
        use_mixed_mlp_moe=True,
        use_cla=False,
        cla_share_factor=2,
        rope_scaling={"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
    ),
    "jamba": dict(
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
    ),
    "kimi_k25": {},
    "kimi_k3": {},
    "kimi_linear": dict(
        model_max_length=1024,
        linear_attn_config=dict(
            kda_layers=[1],
            full_attn_layers=[2],
            num_heads=4,
            head_dim=32,
            short_conv_kernel_size=4,
        ),
    ),
    "kimi_vl": {},
    "laguna": {},
    "lfm2_moe": dict(
        use_expert_bias=True,
        conv_bias=False,
        conv_L_cache=3,
        layer_types=["conv", "full_attention"],
    ),
    "llama4": dict(text=LLAMA4),
    "longcat_flash": dict(
        attention_method="MLA",
        zero_expert_type="identity",
        zero_expert_num=4,
        ffn_hidden_size=64,
        expert_ffn_hidden_size=64,
        num_layers=2,
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
    ),
    "longcat_flash_ngram": dict(
        attention_method="MLA",
        zero_expert_type="identity",
        zero_expert_num=4,
        ffn_hidden_size=64,
        expert_ffn_hidden_size=64,
        num_layers=2,
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
        ngram_vocab_size_ratio=4,
    ),
    "mellum": dict(layer_types=SLIDING),
    "mimo_v2_flash": dict(
        hybrid_layer_pattern=[1, 0],
        moe_layer_freq=[0, 1],
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        sliding_window_size=16,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        swa_rope_theta=1e4,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=16,
        swa_v_head_dim=16,
    ),
    "minimax": dict(rotary_dim=16),
    "minimax_m3_vl": {},
    "mistral4": {},
    "mixtral": {},
    "muse_spark": {},
    "nemotron_h": dict(hybrid_override_pattern=["M", "E", "*", "E"]),
    "olmoe": {},
    "phimoe": {},
    "phixtral": dict(
        num_vocab=VOCABULARY, model_dim=64, num_heads=4, num_layers=2, rotary_dim=8
    ),
    "qwen2_moe": {},
    "qwen3_5_moe": dict(text={}),
    "qwen3_moe": {},
    "qwen3_next": {},
    "qwen3_vl_moe": {},
    "solar_open": {},
    "step3p5": {},
}
