"""Tiny configurations of every family that `check.py` compares.

Two layers of width 64 and 96 token ids, whatever else a family's config.json needs.
"""

VOCABULARY = 96

# Every name that a family may give a size; a family takes the ones it knows.
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
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
YARN = dict(
    type="yarn",
    rope_type="yarn",
    rope_theta=1e4,
    factor=2.0,
    original_max_position_embeddings=512,
    mscale=1.0,
    mscale_all_dim=1.0,
)
GEMMA = dict(
    enable_moe_block=True,
    top_k_experts=2,
    num_kv_shared_layers=0,
    global_head_dim=16,
    vocab_size_per_layer_input=VOCABULARY,
    hidden_size_per_layer_input=0,
    layer_types=SLIDING,
)
GRANITE = dict(
    logits_scaling=2.0,
    attention_multiplier=0.25,
    embedding_multiplier=2.0,
    residual_multiplier=0.5,
)
KIMI = dict(
    linear_attn_config=dict(
        kda_layers=[1],
        full_attn_layers=[2],
        num_heads=4,
        head_dim=32,
        short_conv_kernel_size=4,
    )
)
LONGCAT = dict(
    attention_method="MLA",
    zero_expert_type="identity",
    zero_expert_num=4,
    ffn_hidden_size=64,
    expert_ffn_hidden_size=64,
    num_layers=2,
    mla_scale_q_lora=True,
    mla_scale_kv_lora=True,
)
GPT = dict(n_embd=64, n_layer=2, n_head=4, n_positions=1024, n_ctx=1024)
GEMMA_3N = dict(
    model_type="gemma3n_text",
    num_kv_shared_layers=0,
    vocab_size_per_layer_input=VOCABULARY,
    rope_local_base_freq=1e4,
    final_logit_softcapping=30.0,
    layer_types=SLIDING,
    activation_sparsity_pattern=[0.95, 0.0],  # the first is no sum over its neurons
    hidden_size_per_layer_input=32,
    altup_num_inputs=2,
    altup_coef_clip=120.0,
    altup_correct_scale=True,
    altup_active_idx=0,
    laurel_rank=16,
)
LFM2 = dict(
    conv_bias=False,
    conv_L_cache=3,
    block_dim=64,
    block_multiple_of=32,
    block_ffn_dim_multiplier=1.0,
    block_auto_adjust_ff_dim=False,
    layer_types=["conv", "full_attention"],
)
MINICPM = dict(dim_model_base=32, scale_depth=1.4, scale_emb=2.0)
MINISTRAL = dict(rope_parameters=YARN | dict(llama_4_scaling_beta=0.1))
TEXT_TYPES = dict(kimi_k25="deepseek_v3", kimi_k3="kimi_linear", kimi_vl="deepseek_v3")

# What else a family asks for. `text` becomes its `text_config`, beside the sizes.
FAMILIES: dict[str, dict] = {
    "Klear": {},
    "afmoe": dict(layer_types=SLIDING),
    "bailing_hybrid": {},
    "bailing_moe": {},
    "bailing_moe_linear": {},
    "bailing_moe_v3": {},
    "dbrx": dict(
        d_model=64,
        n_heads=4,
        n_layers=2,
        ffn_config=dict(moe_num_experts=8, moe_top_k=2, ffn_hidden_size=64),
        attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=1e4),
    ),
    "deepseek": {},
    "deepseek_v2": dict(rope_scaling=YARN),
    "deepseek_v3": {},
    "deepseek_v32": {},
    "deepseek_v41": {},
    "dots1": dict(scoring_func="noaux_tc"),
    "ernie4_5_moe": {},
    "exaone_moe": dict(layer_types=SLIDING, is_moe_layer=[False, True]),
    "gemma4": dict(text=GEMMA | dict(model_type="gemma4_text")),
    "gemma4_text": GEMMA,
    "glm4_moe": dict(rope_scaling=None),
    "glm4_moe_lite": dict(num_key_value_heads=4),
    "glm_moe_dsa": dict(
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        moe_layer_freq=1,
        rope_parameters=dict(rope_theta=1e4, rope_type="default"),
    ),
    "gpt_oss": dict(layer_types=SLIDING),
    "granitemoe": GRANITE,
    "granitemoehybrid": GRANITE | dict(layer_types=["mamba", "attention"]),
    "hunyuan": dict(
        use_mixed_mlp_moe=True,
        use_cla=False,
        cla_share_factor=2,
        rope_scaling=dict(alpha=1.0, factor=1.0, type="dynamic"),
    ),
    "jamba": dict(
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
    ),
    "kimi_k25": dict(text={}),
    "kimi_k3": dict(text=KIMI | dict(attn_res_block_size=2)),
    "kimi_linear": KIMI | dict(model_max_length=1024),
    "kimi_vl": dict(text={}),
    "laguna": {},
    "lfm2_moe": dict(
        use_expert_bias=True,
        conv_bias=False,
        conv_L_cache=3,
        layer_types=["conv", "full_attention"],
    ),
    "llama4": dict(
        text=dict(
            num_experts_per_tok=1,  # mlx-lm has no other, nor fewer than 4 layers
            num_hidden_layers=4,
            attention_chunk_size=32,
            interleave_moe_layer_step=1,
            intermediate_size_mlp=64,
            rope_scaling=None,
        )
    ),
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": LONGCAT | dict(ngram_vocab_size_ratio=4),
    "mellum": dict(
        layer_types=SLIDING,
        rope_parameters={kind: dict(rope_theta=1e4) for kind in SLIDING},
    ),
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
    "minimax_m3_vl": dict(text=dict(dense_intermediate_size=64)),
    "mistral4": dict(rope_parameters=YARN | dict(llama_4_scaling_beta=0.1)),
    "mixtral": {},
    "muse_spark": dict(
        text=dict(
            post_norm_eps=1e-5,
            rope_parameters=dict(rope_theta=1e4),
            layer_rope_theta=[1e4, 1e4],
            layer_types=SLIDING,
            final_logit_softcapping=20.0,
            output_multiplier=0.5,
            moe_hidden_size=64,
            num_shared_experts=0,
        )
    ),
    "nemotron_h": dict(hybrid_override_pattern=["M", "E", "*", "E"]),
    "olmoe": {},
    "phimoe": dict(rope_scaling=None),
    "phixtral": dict(
        num_vocab=VOCABULARY, model_dim=64, num_heads=4, num_layers=2, rotary_dim=8
    ),
    "qwen2_moe": {},
    "qwen3_5_moe": dict(text={}),
    "qwen3_moe": {},
    "qwen3_next": {},
    "qwen3_vl_moe": dict(text={}),
    "solar_open": {},
    "step3p5": dict(num_attention_groups=2, share_expert_dim=64),
}


# Dense models: blocks, or neurons where the activation gives exact zeros. Those of one
# model type have names of their own.
DENSE: dict[str, dict] = {
    "afm7": dict(
        hidden_dim=64, num_layers=2, num_kv_reuse_layers=1, num_heads=4, num_kv_heads=2
    ),
    "apertus": dict(post_norm=False, qk_norm=True),
    "baichuan_m1": dict(sliding_window_layers=[0], conv_window=2),
    "bamboo": dict(hidden_act="relu"),
    "bitnet": {},
    "cohere": {},
    "cohere2": dict(sliding_window_pattern=2),
    "ernie4_5": {},
    "exaone": dict(num_layers=2),
    "exaone4": dict(rope_scaling=None, sliding_window_pattern="LG"),
    "falcon_h1": dict(mamba_d_ssm=128),
    "gear": dict(layer_types=SLIDING),
    "gemma": {},
    "gemma2": {},
    "gemma3": dict(text=dict(sliding_window_pattern=2), vocab_size=VOCABULARY),
    "gemma3_text": dict(sliding_window_pattern=2),
    "gemma3n": dict(text=GEMMA_3N),
    "glm": {},
    "glm4": {},
    "gpt2": GPT,
    "gpt_bigcode": GPT | dict(n_inner=128),
    "gpt_neox": dict(layer_norm_eps=1e-5, rotary_emb_base=10000, rotary_pct=0.5),
    "gptj": GPT | dict(rotary_dim=8),
    "granite": GRANITE,
    "helium": {},
    "hunyuan_v1_dense": {},
    "internlm2": {},
    "internlm3": {},
    "iquestloopcoder": {},
    "lfm2": LFM2,
    "lfm2-vl": dict(text=LFM2),
    "lille-130m": GPT | dict(block_size=1024, layer_norm_eps=1e-5, n_kv_heads=2),
    "llama": {},
    "llama, ReLU": dict(model_type="llama", hidden_act="relu"),
    "llama, FATReLU": dict(
        model_type="llama", hidden_act="fatrelu", hidden_act_param=0.01
    ),
    "llama4_text": dict(intermediate_size_mlp=64, no_rope_layers=[1, 0]),
    "mimo": {},
    "minicpm": MINICPM,
    "minicpm3": MINICPM
    | dict(rope_scaling=dict(short_factor=8 * [1.0], long_factor=8 * [1.0])),
    "ministral3": MINISTRAL,
    "mistral": {},
    "mistral, dReLU": dict(model_type="mistral", hidden_act="drelu"),
    "mistral3": dict(text=dict(model_type="ministral3") | MINISTRAL),
    "muse_glimmer": dict(layer_types=SLIDING),
    "nanbeige": {},
    "nanochat": {},
    "nemotron": dict(hidden_act="relu2"),
    "nemotron-nas": dict(
        block_configs=2
        * [dict(attention=dict(n_heads_in_group=2), ffn=dict(ffn_mult=2.0))]
    ),
    "nemotron_h, dense": dict(
        model_type="nemotron_h", hybrid_override_pattern=["M", "-", "*", "-"]
    ),
    "olmo2": {},
    "olmo3": dict(layer_types=SLIDING),
    "olmo_hybrid": dict(
        linear_allow_neg_eigval=True, layer_types=["linear_attention", "full_attention"]
    ),
    "openelm": dict(
        num_transformer_layers=2,
        model_dim=64,
        ffn_dim_divisor=32,
        num_query_heads=[4, 4],
        num_kv_heads=[2, 2],
        ffn_multipliers=[1.0, 2.0],
    ),
    "phi": {},
    "phi3": dict(rope_scaling=None),
    "phi3small": dict(
        vocab_size=100352,  # mlx-lm rules some out by their numbers
        dense_attention_every_n_layers=2,
        ff_intermediate_size=64,
        gegelu_limit=20.0,
    ),
    "pixtral": dict(text={}),
    "plamo": dict(n_shared_head=2),
    "plamo2": dict(hidden_size_per_head=16, mamba_num_heads=4),
    "plamo3": dict(sliding_window_pattern=2),
    "qwen": dict(kv_channels=16),
    "qwen2": {},
    "qwen2_vl": dict(text={}),
    "qwen3": {},
    "qwen3_5": dict(text=dict(num_experts=0)),
    "qwen3_vl": dict(text={}),
    "recurrent_gemma": dict(
        conv1d_width=4,
        logits_soft_cap=30.0,
        attention_window_size=16,
        block_types=["recurrent", "attention"],
        num_key_value_heads=1,
    ),
    "seed_oss": {},
    "smollm3": {},
    "spark2_5": dict(
        layer_types=SLIDING, rope_parameters={k: dict(rope_theta=1e4) for k in SLIDING}
    ),
    "stablelm": dict(use_qkv_bias=False, layer_norm_eps=1e-5),
    "starcoder2": {},
    "talkie": {},
    "telechat3": {},
    "youtu_llm": {},
}


def make_config(family: str) -> dict:
    """The family's config.json."""
    changes = dict((FAMILIES | DENSE)[family])
    # A dense FFN is as wide as several blocks, also when it is quantised.
    sizes = SIZES | dict(intermediate_size=256 if family in DENSE else 64)
    config = sizes | {"model_type": family}
    if "text" in changes:
        name = TEXT_TYPES.get(family, f"{family}_text")
        config["text_config"] = sizes | {"model_type": name} | changes.pop("text")
    return config | changes
