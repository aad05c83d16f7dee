"""A mixture of experts larger than its memory, in place and converted.

Writes a stock mlx-lm checkpoint of the shape of Qwen3-30B-A3B (48 layers, 128 experts
of which a token takes 8, 4 bits; a vocabulary of 2,048) with random weights, layer by
layer, generates from it within a budget, and with --convert does so again from a flash
folder. Every layer adds little to what the embedding says, so that different tokens
choose different experts: routing is uniform, the worst case for any cache, and hit
rate and bytes are not those of a trained model. float32 scales, because half-precision
quantised products are many times slower on MLX's CPU backend.
"""

import json
import multiprocessing
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
import psutil
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_moe
from mlx_lm.sample_utils import make_sampler
from tqdm import tqdm

import mlx_flash
from mlx_flash import generation
from mlx_flash.cli.common import DEMO_MODEL
from mlx_flash.loading import load_tokenizer
from mlx_flash.memory.system import peak_process_bytes

CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "vocab_size": 2048,
}
RNG = np.random.default_rng(0)  # MLX has no random uint32 of all 32 bits
PACKING = {"group_size": 64, "bits": 4}
# The embedding large and what layers add small, for uniform routing (see above)
SPREAD = {"embed_tokens": 50.0, "o_proj": 0.02, "down_proj": 0.02}


def write_checkpoint(folder: Path, layers: int) -> None:
    """One shard a layer, each made and let go before the next."""
    folder.mkdir(parents=True)
    config = CONFIG | {"num_hidden_layers": layers, "quantization": PACKING}
    (folder / "config.json").write_text(json.dumps(config))
    args = qwen3_moe.ModelArgs.from_dict(config)
    model = qwen3_moe.Model(args)
    weights = {}
    for name, shape in shapes(model):
        weights |= random_weights(name, shape)
    groups: dict[str, dict] = {}
    for name, make in weights.items():
        layer = name.split(".")[2] if ".layers." in name else "outer"
        groups.setdefault(layer, {})[name] = make
    for layer, makers in tqdm(groups.items(), desc="writing", unit="shard"):
        arrays = {name: make() for name, make in makers.items()}
        mx.save_safetensors(str(folder / f"model-{layer}.safetensors"), arrays)


def shapes(model) -> list[tuple[str, tuple]]:
    return [(name, w.shape) for name, w in tree_flatten(model.parameters())]


def random_weights(name: str, shape: tuple) -> dict:
    """Makers of a weight's arrays: packed where mlx-lm would quantise it."""
    path = name.removesuffix(".weight")
    if len(shape) == 1:
        return {name: lambda: mx.ones(shape)}
    groups = (*shape[:-1], shape[-1] // PACKING["group_size"])
    packed = (*shape[:-1], shape[-1] * PACKING["bits"] // 32)
    # 4-bit values around 7.5, with a spread like that of 1/sqrt(inputs)
    scale = 0.2 * shape[-1] ** -0.5
    scale *= next((f for end, f in SPREAD.items() if path.endswith(end)), 1.0)
    return {
        name: lambda: mx.array(RNG.integers(0, 2**32, packed, np.uint32)),
        f"{path}.scales": lambda: mx.full(groups, scale),
        f"{path}.biases": lambda: mx.full(groups, -7.5 * scale),
    }


def run(folder: Path, memory: str, prompt_tokens: int, tokens: int) -> dict:
    """Generate, and say what it took; in a process of its own for its peak memory."""
    tokenizer = load_tokenizer(DEMO_MODEL)
    baseline = psutil.Process().memory_info().rss
    context = prompt_tokens + tokens
    begin = time.perf_counter()
    with mlx_flash.load_model(folder, memory, context=context) as (model, _):
        load_s = time.perf_counter() - begin
        prompt = list(range(100, 100 + prompt_tokens))
        rows = generation.stream_generate(
            model,
            tokenizer,
            prompt,
            max_tokens=tokens,
            sampler=make_sampler(temp=1.0),  # greedily it repeats one token
        )
        for _ in tqdm(rows, desc="generating", total=tokens, unit="token"):
            pass
        report = generation.report(model.flash)
        slots = model.flash.budget.slots
    growth = peak_process_bytes() - baseline
    return report | {
        "growth_bytes": growth,
        "baseline_bytes": baseline,
        "load_s": load_s,
        "slots_per_layer": slots[-1],
        "routing": "uniform, of random weights",
    }


def row_of(name: str, memory: str, report: dict) -> dict:
    ms = report["ms_per_token"]
    return {
        "": name,
        "on disk": f"{report['model_bytes'] / 1e9:.1f} GB",
        "budget": memory,
        "growth of the process": f"{report['growth_bytes'] / 1e9:.2f} GB",
        "slots": f"{report['slots_per_layer']} of {CONFIG['num_experts']}",
        "to first token": f"{report['time_to_first_token_s']:.1f} s",
        "ms per token": f"{ms['total']:,.0f}",
        "I/O, cache, compute": f"{ms['io']:,.0f}, {ms['cache']:.1f}, "
        f"{ms['compute']:,.0f}",
        "MB per token": f"{report['bytes_per_token'] / 1e6:,.0f}",
        "reads": f"{report['reads_per_token']:,.0f}",
        "hit rate": f"{report['hit_rate']:.1%}",
    }


def convert(source: Path, target: Path) -> dict:
    """Convert, and say what it took; in a process of its own for its peak memory."""
    begin = time.perf_counter()
    mlx_flash.convert(source, target)
    return {
        "peak_process_bytes": peak_process_bytes(),
        "seconds": time.perf_counter() - begin,
        "layer_bytes": max(f.stat().st_size for f in (target / "ffn").iterdir()),
    }


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="Where; kept if given.")
@click.option("--layers", default=48, show_default=True)
@click.option("--memory", default="6GB", show_default=True)
@click.option("--prompt-tokens", default=16, show_default=True)
@click.option("--tokens", default=8, show_default=True)
@click.option("--convert", "converted", is_flag=True, help="Converted, too.")
def main(folder, layers, memory, prompt_tokens, tokens, converted):
    """Write the checkpoint if it is not there, generate, print a table and JSON."""
    made = folder is None
    folder = folder or Path(tempfile.mkdtemp()) / "moe"
    if not folder.exists():
        write_checkpoint(folder, layers)
    spawn = multiprocessing.get_context("spawn")
    alone = partial(ProcessPoolExecutor, 1, mp_context=spawn)
    reports, conversion = {}, None
    for name in ("in place", "converted") if converted else ("in place",):
        source = folder
        if name == "converted":
            source = folder.with_name(folder.name + "-flash")
            if not source.exists():
                with alone() as pool:
                    conversion = pool.submit(convert, folder, source).result()
        with alone() as pool:
            job = pool.submit(run, source, memory, prompt_tokens, tokens)
            reports[name] = job.result()
    rows = [row_of(name, memory, report) for name, report in reports.items()]
    for cells in (rows[0].keys(), ["---"] * len(rows[0]), *(r.values() for r in rows)):
        print(f"| {' | '.join(cells)} |")
    if conversion:
        print(
            f"Converting took {conversion['seconds']:.0f} s and at most "
            f"{conversion['peak_process_bytes'] / 1e9:.2f} GB; a layer's experts are "
            f"{conversion['layer_bytes'] / 1e9:.2f} GB."
        )
    print(json.dumps({"runs": reports, "conversion": conversion}))
    if made:
        shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()
