"""The cost model against runs on this machine: neurons, experts, blocks.

Writes models of about 1 GB with random weights in float32 (experts at 4 bits) once,
generates from each within three budgets, and prints modelled beside measured
milliseconds per token. The share of units found in memory is the run's own: what random
weights choose says nothing about real models, and it is the model of costs that is
checked here. The profile is the one `mlx-flash probe` stored; probe just before.

Run: mlx-flash probe FOLDER && python demos/plan_check.py FOLDER
"""

import json
from pathlib import Path

import bench_moe
import click
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.sample_utils import make_sampler
from synthetic import numbers_text, opt_checkpoint

import mlx_flash
from mlx_flash import generation
from mlx_flash.cli.common import DEMO_MODEL
from mlx_flash.converters.convert import convert
from mlx_flash.errors import FlashError
from mlx_flash.loading import load_tokenizer
from mlx_flash.planning.plan import make_plan
from mlx_flash.planning.profile import load_profile

DIMS, FFN, VOCAB = 2048, 8192, 2048
LLAMA = {
    "model_type": "llama",
    "hidden_size": DIMS,
    "num_hidden_layers": 4,
    "intermediate_size": FFN,
    "num_attention_heads": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "dtype": "float32",
}


def neurons(folder: Path) -> Path:
    """An OPT whose predictors are fitted in a few steps: enough to choose neurons."""
    source, text = folder / "opt", folder / "numbers.txt"
    opt_checkpoint(source, DIMS, FFN, layers=5, vocab=VOCAB)
    numbers_text(text, 1024, VOCAB)
    options = dict(calibration=text, calibration_tokens=1024, fit_steps=12)
    return convert(source, folder / "neurons", dtype="float32", **options)


def experts(folder: Path) -> Path:
    bench_moe.write_checkpoint(folder / "experts", 3)
    return folder / "experts"


def blocks(folder: Path) -> Path:
    source = folder / "llama"
    source.mkdir()
    model = llama.Model(llama.ModelArgs.from_dict(LLAMA))
    (source / "config.json").write_text(json.dumps(LLAMA))
    weights = {k: 0.02 * mx.ones(v.shape) for k, v in tree_flatten(model.parameters())}
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    return convert(source, folder / "blocks")


MODELS = {"neurons": neurons, "experts": experts, "blocks": blocks}


def measure(folder: Path, memory: str, prompt: int, tokens: int) -> dict:
    """The report of a run, whose first quarter only fills the slots."""
    tokenizer = load_tokenizer(DEMO_MODEL)  # its vocabulary has 2,048 tokens, too
    context = prompt + tokens
    with mlx_flash.load_model(folder, memory, context=context) as (model, _):
        steps = generation.stream_generate(
            model,
            tokenizer,
            list(range(100, 100 + prompt)),
            max_tokens=tokens,
            sampler=make_sampler(temp=1.0),
        )
        run = None
        for count, _ in enumerate(steps):
            run = model.flash.run
            if count == tokens // 4:
                run.first_stats, run.first_time = run.last_stats, run.last_time
                run.tokens = run.tokens[-1:]
        return generation.report(model.flash)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--kind", multiple=True, type=click.Choice(list(MODELS)))
@click.option("--memory", multiple=True, default=("50%", "65%", "80%"))
@click.option("--prompt-tokens", default=8, show_default=True)
@click.option("--tokens", default=24, show_default=True)
@click.option("--rounds", default=2, show_default=True)
def main(folder, kind, memory, prompt_tokens, tokens, rounds):
    """Write the models below FOLDER if they are not there, run them, print a table."""
    profile = load_profile()
    if profile is None:
        raise SystemExit("This machine has no profile yet: mlx-flash probe")
    folder.mkdir(parents=True, exist_ok=True)
    print("| unit | memory | hits | modelled ms | measured ms | off | I/O | compute |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for name in kind or MODELS:
        path = folder / name
        if not path.exists():
            path = MODELS[name](folder)
        for share in memory:
            context = prompt_tokens + tokens
            try:
                runs = [
                    measure(path, share, prompt_tokens, tokens) for _ in range(rounds)
                ]
            except FlashError as error:
                print(f"| {name} | {share} | {str(error)[:60]} |")
                continue
            best = min(runs, key=lambda r: r["ms_per_token"]["total"])
            plan = make_plan(
                path,
                share,
                profile,
                context=context,
                prompt_tokens=context,
                hit_rate=best["hit_rate"],
            )
            rows.append(row(name, share, plan, best))
    print(json.dumps({"machine": profile.device, "rows": rows}))


def row(name: str, share: str, plan, measured: dict) -> dict:
    """Print one line, and return it."""
    ms, modelled = measured["ms_per_token"], plan.ms_per_token[1]
    parts = plan.ms_of_slowest
    off = modelled / ms["total"] - 1
    hits = measured["hit_rate"]
    print(
        f"| {name} | {share} | {'–' if hits is None else f'{hits:.1%}'} | "
        f"{modelled:,.1f} | {ms['total']:,.1f} | {off:+.0%} | "
        f"{parts['io']:,.1f} / {ms['io']:,.1f} | "
        f"{parts['compute']:,.1f} / {ms['compute']:,.1f} |",
        flush=True,
    )
    return {
        "unit": name,
        "memory": share,
        "hit_rate": hits,
        "modelled": {"total": modelled, **parts, "bytes": plan.bytes_per_token[1]},
        "measured": {**ms, "bytes": measured["bytes_per_token"]},
        "reads": measured["reads_per_token"],
    }


if __name__ == "__main__":
    main()
