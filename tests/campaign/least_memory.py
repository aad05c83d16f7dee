"""The least memory that models need, with more and less of them on flash.

    python tests/campaign/least_memory.py

Models of published sizes are planned from their configurations alone, for 2,048 tokens
of context: with FFNs on flash (of mixtures, the experts), with rows of embeddings too,
and with dense FFNs of mixtures too. One of 0.5 GB is made with random weights, and runs
in the least memory.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx
from conftest import save_tokenizer
from stock_checkpoints import QWEN3, write_checkpoint

import mlx_flash
from mlx_flash.assembly import shapes_of
from mlx_flash.checkpoints.weight_format import layer_of
from mlx_flash.errors import NotEnoughMemory
from mlx_flash.layers import lookup
from mlx_flash.layers.kinds import BLOCK, EXPERT
from mlx_flash.planning.outline import Outline, outline
from mlx_flash.planning.plan import plan_of

CONTEXT = 2048
COMMON = dict(torch_dtype="bfloat16", rms_norm_eps=1e-6, rope_theta=1e6)
FOUR_BITS = dict(quantization=dict(group_size=64, bits=4))
QWEN3_30B = COMMON | dict(
    model_type="qwen3_moe",
    hidden_size=2048,
    num_hidden_layers=48,
    intermediate_size=6144,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    vocab_size=151_936,
    max_position_embeddings=40_960,
    num_experts=128,
    num_experts_per_tok=8,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    moe_intermediate_size=768,
    norm_topk_prob=True,
    tie_word_embeddings=False,
)
DEEPSEEK_V2_LITE = COMMON | dict(
    model_type="deepseek_v2",
    hidden_size=2048,
    num_hidden_layers=27,
    intermediate_size=10_944,
    num_attention_heads=16,
    num_key_value_heads=16,
    vocab_size=102_400,
    max_position_embeddings=163_840,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    moe_intermediate_size=1408,
    first_k_dense_replace=1,
    moe_layer_freq=1,
    kv_lora_rank=512,
    q_lora_rank=None,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
    routed_scaling_factor=1.0,
    topk_method="greedy",
    rope_scaling=dict(
        type="yarn",
        factor=40,
        original_max_position_embeddings=4096,
        beta_fast=32,
        beta_slow=1,
        mscale=0.707,
        mscale_all_dim=0.707,
    ),
    n_group=1,
    topk_group=1,
)
GEMMA_3N_E4B = dict(
    model_type="gemma3n",
    torch_dtype="bfloat16",
    text_config=dict(
        model_type="gemma3n_text",
        hidden_size=2048,
        num_hidden_layers=35,
        intermediate_size=16_384,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        rms_norm_eps=1e-6,
        vocab_size=262_400,
        vocab_size_per_layer_input=262_144,
        hidden_size_per_layer_input=256,
        num_kv_shared_layers=15,
        sliding_window=512,
        max_position_embeddings=32_768,
        rope_local_base_freq=1e4,
        rope_theta=1e6,
        final_logit_softcapping=30.0,
        layer_types=[
            "full_attention" if i % 5 == 4 else "sliding_attention" for i in range(35)
        ],
        activation_sparsity_pattern=[0.95] * 10 + [0.0] * 25,
        altup_num_inputs=4,
        altup_coef_clip=120.0,
        altup_correct_scale=True,
        altup_active_idx=0,
        laurel_rank=64,
    ),
)
DEEPSEEK_V3 = COMMON | dict(
    model_type="deepseek_v3",
    hidden_size=7168,
    num_hidden_layers=61,
    intermediate_size=18_432,
    num_attention_heads=128,
    num_key_value_heads=128,
    vocab_size=129_280,
    max_position_embeddings=163_840,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    first_k_dense_replace=3,
    moe_layer_freq=1,
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
    routed_scaling_factor=2.5,
    n_group=8,
    topk_group=4,
    norm_topk_prob=True,
)
LONGCAT_LITE = COMMON | dict(
    model_type="longcat_flash_ngram",
    hidden_size=3072,
    num_layers=14,
    ffn_hidden_size=6144,
    expert_ffn_hidden_size=1024,
    n_routed_experts=256,
    zero_expert_num=128,
    moe_topk=12,
    vocab_size=131_072,
    max_position_embeddings=32_768,
    num_attention_heads=32,
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
    routed_scaling_factor=6.0,
    mla_scale_q_lora=True,
    mla_scale_kv_lora=True,
    ngram_vocab_size_ratio=78,
    emb_neighbor_num=4,
    emb_split_num=4,
)
PLANNED = {
    "Qwen3-30B-A3B, bfloat16": QWEN3_30B,
    "Qwen3-30B-A3B, 4 bits": QWEN3_30B | FOUR_BITS,
    "DeepSeek-V2-Lite, bfloat16": DEEPSEEK_V2_LITE,
    "DeepSeek-V3, 4 bits": DEEPSEEK_V3 | FOUR_BITS,
    "Gemma 3n E4B, bfloat16": GEMMA_3N_E4B,
    "Gemma 3n E4B, 4 bits": GEMMA_3N_E4B | FOUR_BITS,
    "LongCat-Flash-Lite, bfloat16": LONGCAT_LITE,
}
MUCH = "10000GB"
# 0.13 GB of embeddings, as many for logits, 0.1 GB of shared experts
MADE = QWEN3 | dict(
    model_type="qwen2_moe",
    hidden_size=512,
    vocab_size=64_000,
    shared_expert_intermediate_size=16_384,
)


def resident_tables():
    """All tables stay in memory, as before they could go to flash."""
    return mock.patch.object(lookup, "LEAST_TABLE_BYTES", sys.maxsize)


def with_blocks(found: Outline) -> Outline:
    """The model as `convert --blocks` would have it."""
    blocks = [
        layer_of(path, BLOCK.split(ffn))
        for path, ffn in BLOCK.find(found.model).items()
    ]
    manifest, taken = found.manifest, sum(block.nbytes for block in blocks)
    resident = replace(manifest.resident, bytes=manifest.resident.bytes - taken)
    manifest = replace(manifest, resident=resident, blocks=tuple(blocks))
    on_flash = [entry.module for entry in manifest.layers + manifest.blocks]
    shapes = shapes_of(found.model, found.config, on_flash)
    return replace(found, manifest=manifest, shapes=shapes)


def planned(folder: Path) -> list[str]:
    """Sizes of a model of which the configuration is known alone, in GB."""
    plans = []
    with resident_tables():
        plans.append(plan_of(outline(folder), folder, MUCH, context=CONTEXT))
    found = outline(folder)
    plans.append(plan_of(found, folder, MUCH, context=CONTEXT))
    if found.manifest.unit == EXPERT.name and BLOCK.find(found.model):
        plans.append(plan_of(with_blocks(found), folder, MUCH, context=CONTEXT))
    last = plans[-1]
    sizes = [last.model_bytes, last.table_bytes, last.block_bytes]
    sizes += [plan.least_bytes for plan in plans]
    return [f"{nbytes / 1e9:.2f}" for nbytes in sizes] + [""] * (3 - len(plans))


def measured(folder: Path) -> list[str]:
    """The least memory, and the peak of a run in it, in MB."""
    try:
        mlx_flash.load_model(folder, "1MB", context=CONTEXT)
    except NotEnoughMemory as error:
        least = error.least_bytes
    with mlx_flash.load(folder, least, context=CONTEXT) as (model, tokenizer):
        mx.reset_peak_memory()
        mlx_flash.generate(model, tokenizer, [5, 6, 7] * 100, max_tokens=16)
        peak = model.flash.report().peak_memory_bytes
    return [f"{least / 1e6:.1f}", f"{peak / 1e6:.1f}"]


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        row("planned", "all", "tables", "dense", "least", "with rows", "and blocks")
        row(*["---"] * 7)
        for number, (name, config) in enumerate(PLANNED.items()):
            folder = Path(work) / f"{number}"
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config))
            row(name, *planned(folder))
        print()
        row("run", "least", "its peak")
        row(*["---"] * 3)
        folder = write_checkpoint(Path(work) / "made", MADE)
        save_tokenizer(folder)
        with resident_tables():
            row("all tables resident", *measured(folder))
        row("rows, in place", *measured(folder))
        flash = mlx_flash.convert(
            folder, Path(work) / "flash", blocks=True, progress=False
        )
        row("rows and blocks", *measured(flash))


if __name__ == "__main__":
    main()
