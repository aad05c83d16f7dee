"""Is every family of models the same from flash as it is in memory?

For each family a tiny checkpoint with random weights is written and loaded twice: by
mlx-lm as a whole, and by mlx-flash with slots for a quarter of a layer's experts,
neurons or blocks: in place, and converted. All read the same prompt and further tokens.
Experts must give the same bits; neurons and blocks are added up in another order, and
agree to 1e-4 of the largest logit.
"""

import contextlib
import io
import json
import re
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_flash.converters import blocks
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as load_resident
from mlx_lm.utils import quantize_model

import mlx_flash
from mlx_flash.assembly import assemble
from mlx_flash.budget import make_budget
from mlx_flash.models import get_model_classes

PROMPT, DECODED, VOCABULARY = 70, 3, 96  # mlx-lm sorts from 64 pairs on
DENSE_PROMPT = 40
BLOCK_BYTES = 8_000  # so that these small FFNs are more than one block
TOKENS = 60  # ids that every one of these vocabularies has
SUM_TOLERANCE = 1e-4  # of the largest logit, for sums in another order
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


# Dense models of mlx-lm: blocks, or neurons where the activation gives zeros
DENSE: dict[str, dict] = {
    "apertus": {},
    "cohere": {},
    "cohere2": {},
    "ernie4_5": {},
    "exaone": {},
    "exaone4": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "glm": {},
    "glm4": {},
    "gpt2": {},
    "gpt_neox": {},
    "gptj": {},
    "granite": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "internlm2": {},
    "internlm3": {},
    "lfm2": {},
    "llama": {},
    "mimo": {},
    "minicpm": {},
    "ministral3": {},
    "nanochat": {},
    "nemotron": dict(hidden_act="relu2"),
    "olmo2": {},
    "olmo3": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_5": dict(text={}),
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}


def make_config(family: str) -> dict:
    """The family's config.json."""
    changes = dict((FAMILIES | DENSE)[family])
    config = SIZES | {"model_type": family}
    if "text" in changes:
        name = TEXT_TYPES.get(family, f"{family}_text")
        config["text_config"] = SIZES | {"model_type": name} | changes.pop("text")
    return config | changes


def write_checkpoint(folder: Path, config: dict, bits: int | None) -> Path:
    """A checkpoint as mlx-lm would save it, with random weights that all matter."""
    model_class, args_class = get_model_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.random.seed(0)

    def draw(array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        around = 1.0 if array.ndim == 1 else 0.0  # norms
        return (around + 0.15 * mx.random.normal(array.shape)).astype(array.dtype)

    model.apply(draw)
    if bits:
        rule = getattr(model, "quant_predicate", None)  # routers, say, stay at 8 bits
        with contextlib.redirect_stdout(io.StringIO()):
            model, config = quantize_model(
                model, config, 32, bits, quant_predicate=rule
            )
    weights = dict(tree_flatten(model.parameters()))
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def few_slots(folder: Path) -> int:
    """The least memory in bytes with which a quarter of each layer's units fits."""
    parts = assemble(folder, predictor=False)

    def enough(memory: int) -> bool:
        try:
            budget = make_budget(memory, parts.manifest, parts.shapes, 128, folder)
        except mlx_flash.FlashError:
            return False
        layers = parts.manifest.layers
        return all(n >= x.units // 4 for n, x in zip(budget.slots, layers, strict=True))

    low, high = 0, 1 << 30
    while high - low > 1024:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def run(model, prompt: int) -> list[np.ndarray]:
    """Logits of a prompt, and of further tokens one by one."""
    tokens = np.random.default_rng(0).integers(0, TOKENS, (1, prompt + DECODED))
    cache = make_prompt_cache(model)
    steps = mx.split(mx.array(tokens), range(prompt, prompt + DECODED), axis=1)
    return [np.array(model(step, cache=cache).astype(mx.float32)) for step in steps]


def compare(folder: Path, expected: list[np.ndarray]) -> tuple[str, str, float]:
    """Stream the model in `folder`; (unit, layers from flash, largest difference)."""
    model, _ = mlx_flash.load_model(
        folder, few_slots(folder), predictor=False, context=128, page_cache=True
    )
    flash = model.flash
    try:
        actual = run(model, expected[0].shape[1])
    finally:
        flash.close()
    if flash.stats.misses == 0 or any(
        slots == layer.units
        for slots, layer in zip(flash.budget.slots, flash.manifest.layers, strict=True)
    ):
        raise RuntimeError("a layer was not streamed: this compares nothing")
    if not all(np.isfinite(e).all() and np.ptp(e) > 0 for e in expected):
        raise RuntimeError("the resident model's logits are NaN or all alike")
    diff = max(np.abs(a - e).max() for a, e in zip(actual, expected, strict=True))
    layers = f"{len(flash.layers)} of {len(flash.manifest.layers)}"
    return flash.manifest.unit, layers, float(diff)


def check(family: str, checkpoint: Path | None, work: Path, bits: int | None) -> dict:
    """One row of the table. `checkpoint` is None where one has to be made."""
    row = {"family": family, "unit": "", "layers": "", "from": "", "difference": None}
    dense = checkpoint is not None or family in DENSE
    try:
        if checkpoint is None:
            config = make_config(family)
            checkpoint = write_checkpoint(work / "checkpoint", config, bits)
        resident, _ = load_resident(checkpoint, get_model_classes=get_model_classes)
        expected = run(resident, DENSE_PROMPT if dense else PROMPT)
    except Exception as error:  # a row, so that the other families are still checked
        return row | {"from": "mlx-lm cannot run it here", "verdict": reason(error)}
    try:
        results = {}
        if not dense:
            with contextlib.suppress(mlx_flash.FlashError):  # then only converted
                results["in place"] = compare(checkpoint, expected)
        flash = mlx_flash.convert(checkpoint, work / "flash", rank=0, progress=False)
        results["converted"] = compare(flash, expected)
    except mlx_flash.FlashError as error:
        return row | {"from": "refused", "verdict": reason(error)}
    except Exception as error:
        return row | {"from": "FAILED", "verdict": reason(error)}
    worst = max(difference for _, _, difference in results.values())
    scale = max(float(np.abs(e).max()) for e in expected)
    unit = results["converted"][0]
    allowed = 0.0 if unit == "expert" else SUM_TOLERANCE * scale
    return row | {
        "unit": unit,
        "layers": results["converted"][1],
        "from": ", ".join(results),
        "difference": worst,
        "verdict": f"{worst:.2g}" + ("" if worst <= allowed else " DIFFERS"),
    }


def reason(error: Exception) -> str:
    text = re.sub(tempfile.gettempdir() + r"\S*/", "", f"{error}")
    if not isinstance(error, mlx_flash.FlashError):
        text = f"{type(error).__name__} {text}"
    return " ".join(text.split())[:140]


def all_families() -> dict[str, Path | None]:
    """Every family by name; those of ours with a checkpoint from the tests."""
    ours = {f"{p.parent.name}/{p.name}": p for p in sorted(GOLDENS.glob("*/*"))}
    return dict.fromkeys(FAMILIES) | dict.fromkeys(DENSE) | ours


@click.command()
@click.option("--family", help="Only this one.")
@click.option("--bits", type=int, help="Quantise the checkpoints, as mlx-lm does.")
def main(family, bits):
    """Compare every family from flash with the same model in memory."""
    families = all_families()
    if family and family not in families:
        raise click.BadParameter(f"{family!r} is none of {', '.join(families)}.")
    print("| family | unit | layers from flash | from | largest difference |")
    print("| --- | --- | --- | --- | --- |")
    blocks.UNIT_BYTES = BLOCK_BYTES
    begin, rows = time.perf_counter(), []
    for name in [family] if family else families:
        with tempfile.TemporaryDirectory(prefix="families-") as work:
            row = check(name, families[name], Path(work), bits)
        cells = [row[k] for k in ("family", "unit", "layers", "from", "verdict")]
        print("|", " | ".join(cells), "|", flush=True)
        rows.append(row)

    def names(test) -> list[str]:
        return [row["family"] for row in rows if test(row)]

    differ = names(lambda row: "DIFFERS" in row["verdict"])
    failed = names(lambda row: row["from"] == "FAILED")
    summary = {
        "compared": len(names(lambda row: row["difference"] is not None)),
        "identical": len(names(lambda row: row["difference"] == 0)),
        "differ": differ,
        "failed": failed,
        "refused": names(lambda row: row["from"] == "refused"),
        "not_run": names(lambda row: "mlx-lm" in row["from"]),
        "seconds": round(time.perf_counter() - begin, 1),
        "bits": bits,
        "device": str(mx.default_device()),
        "mlx": mx.__version__,
        "mlx_lm": version("mlx_lm"),
    }
    print(json.dumps(summary))
    sys.exit(1 if differ or failed else 0)


if __name__ == "__main__":
    main()
