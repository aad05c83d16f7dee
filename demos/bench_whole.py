"""What does the engine cost where everything fits in memory?

The same random checkpoint, as mlx-lm runs it and from flash with memory for all of it,
token by token in turn, so that a busy machine slows both alike. One model of neurons,
one of blocks, one of experts, in float32.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import click
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as load_resident

import mlx_flash
from mlx_flash.models.registry import get_model_classes

COMMON = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
MODELS = {
    "neurons": COMMON | {"model_type": "llama", "hidden_act": "relu"},
    "blocks": COMMON | {"model_type": "llama"},
    "experts": COMMON
    | {
        "model_type": "qwen3_moe",
        "head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
    },
}


def write_checkpoint(folder: Path, config: dict) -> None:
    model_class, args_class = get_model_classes(config)
    model = model_class(args_class.from_dict(config))
    folder.mkdir()
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))


def step(model, cache, token: int) -> float:
    """Seconds of one token."""
    begin = time.perf_counter()
    mx.eval(model(mx.array([[token]]), cache=cache))
    return time.perf_counter() - begin


def compare(config: dict, tokens: int, work: Path) -> tuple[float, float, list[float]]:
    """Median ms of a token resident and from flash, and the ratio of each pair."""
    write_checkpoint(work / "stock", config)
    folder = work / "stock"
    if config["model_type"] != "qwen3_moe":
        folder = mlx_flash.convert(folder, work / "flash", rank=0, progress=False)
    plain, _ = load_resident(work / "stock", get_model_classes=get_model_classes)
    with mlx_flash.load_model(folder, "200%", context=tokens + 16) as (model, _):
        assert all(layer.store.holds_all for layer in model.flash.layers)
        caches = [make_prompt_cache(m) for m in (plain, model)]
        times = []
        for token in range(tokens):
            pair = [(plain, caches[0]), (model, caches[1])]
            order = pair if token % 2 else pair[::-1]
            taken = {id(m): step(m, c, token) for m, c in order}
            times.append((taken[id(plain)], taken[id(model)]))
    times = times[8:]  # the first ones read pages for the first time
    ratios = [b / a for a, b in times]
    a, b = (1e3 * statistics.median(t) for t in zip(*times, strict=True))
    return a, b, ratios


@click.command()
@click.option("--tokens", default=120, show_default=True)
def main(tokens):
    """Print a table of medians, with quartiles of the ratio."""
    print("| unit | mlx-lm, ms per token | from flash, all in memory | ratio |")
    print("| --- | --- | --- | --- |")
    for name, config in MODELS.items():
        with tempfile.TemporaryDirectory() as work:
            a, b, ratios = compare(config, tokens, Path(work))
        low, middle, high = statistics.quantiles(ratios, n=4)
        cells = f"{a:.1f} | {b:.1f} | {middle:.2f} ({low:.2f} to {high:.2f})"
        print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
