"""What converting and generating really hold in memory, against what was promised.

A synthetic OPT checkpoint is converted by the command line in a process of its own,
then the result generates at several budgets, each in a fresh process. Growth is what a
process's resident memory rises, at its peak, above what Python and the libraries take
once they are imported. It may exceed the budget by a fixed overhead and no more, and it
must not rise from token to token.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click

OVERHEAD_BYTES = 50_000_000  # what a process may grow by on top of its budget
CONVERT_BYTES = 1_000_000_000  # what converting a model of 3 GB may take
FLAT_BYTES = 10_000  # growth per token that counts as none

# The command line, with a fit that is shorter than an option can make it: memory does
# not depend on the number of its steps.
SHORT_FIT = """
import functools
from mlx_flash.cli import main
from mlx_flash.converters import convert as converting
converting.convert = functools.partial(converting.convert, fit_steps={steps})
main()
"""


class Watch(threading.Thread):
    """The resident memory of this process, fifty times a second, and its peak."""

    def __init__(self):
        super().__init__(daemon=True)
        import psutil

        self.process, self.peak, self.stop = psutil.Process(), 0, False

    def now(self) -> int:
        size = self.process.memory_info().rss
        self.peak = max(self.peak, size)
        return size

    def run(self):
        while not self.stop:
            self.now()
            time.sleep(0.02)


def generate_here(
    folder: str, memory: str, predictor: bool, prompt: int, tokens: int
) -> dict:
    """Load and generate, greedily from random token ids; returns what it took."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    import mlx_flash.generation  # noqa: F401 - part of the baseline
    import mlx_flash.loading
    from mlx_flash.memory.budget import KV_STEP

    mx.eval(mx.zeros((64, 64)) @ mx.zeros((64, 64)))
    watch = Watch()
    baseline = watch.now()
    watch.start()
    begin = time.perf_counter()
    loaded = mlx_flash.load_model(
        folder, memory, predictor=predictor, context=prompt + tokens
    )
    with loaded as (model, config):
        flash, after_load = model.flash, watch.now()
        load_s, load_peak = time.perf_counter() - begin, mx.get_peak_memory()
        cache = make_prompt_cache(model)
        for layer in cache:
            layer.step = KV_STEP  # as mlx_flash.generation does
        ids = np.random.default_rng(0).integers(0, config["vocab_size"], prompt)
        steps = generate_step(
            mx.array(ids),
            model,
            max_tokens=tokens,
            prompt_cache=cache,
            prefill_step_size=flash.budget.prefill_tokens,
        )
        sizes, begin = [], time.perf_counter()
        for _ in steps:
            sizes.append(watch.now())
        generate_s = time.perf_counter() - begin
        stats, budget = flash.stats, flash.budget
        watch.stop = True
        return {
            "budget_bytes": budget.total_bytes,
            "budget": {
                "resident": budget.resident_bytes,
                "predictors": budget.predictor_bytes,
                "kv": budget.kv_bytes,
                "workspace": budget.workspace_bytes,
                "slots": budget.slot_bytes,
            },
            "prefill_tokens": budget.prefill_tokens,
            "slots": budget.slots[0],
            "units": flash.manifest.layers[0].units,
            "model_bytes": flash.manifest.model_bytes,
            "mlx_peak_bytes": mx.get_peak_memory(),
            "mlx_peak_after_load_bytes": load_peak,
            "mlx_active_bytes": mx.get_active_memory(),
            "mlx_cache_bytes": mx.get_cache_memory(),
            "baseline_bytes": baseline,
            "after_load_bytes": after_load,
            "peak_bytes": watch.peak,
            "growth_bytes": watch.peak - baseline,
            "load_s": load_s,
            "s_per_token": generate_s / tokens,
            "prompt": prompt,
            "tokens": tokens,
            "sizes": sizes,
            "slope_bytes_per_token": slope(sizes),
            "hit_rate": stats.hit_rate,
            "bytes_per_token": stats.bytes_read / tokens,
        }


def slope(sizes: list[int]) -> float | None:
    """Bytes per token over the second half, where slots and KV cache are in place."""
    import numpy as np

    late = sizes[len(sizes) // 2 :]
    if len(late) < 8:
        return None
    return float(np.polyfit(np.arange(len(late)), late, 1)[0])


def spawn(folder: Path, memory: str, predictor: bool, prompt: int, tokens: int) -> dict:
    """`generate_here` in a fresh process; a refused budget comes back as `error`."""
    asked = json.dumps([str(folder), memory, predictor, prompt, tokens])
    done = subprocess.run(
        [sys.executable, __file__, "--child", asked], capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        return {"memory": memory, "predictor": predictor, "error": lines[-1]}
    facts = json.loads(done.stdout.splitlines()[-1])
    return {"memory": memory, "predictor": predictor, **facts}


def least(folder: Path, prompt: int, tokens: int) -> str:
    """The smallest budget, as the refusal of a tiny one names it."""
    error = spawn(folder, "1KB", True, prompt, tokens)["error"]
    return error.split("--memory ")[1].split()[0]


def convert(source: Path, target: Path, options: list[str], fit_steps: int) -> dict:
    """Run `mlx-flash convert`; its seconds and the peak memory of its process."""
    command = [sys.executable, "-m", "mlx_flash.cli"]
    if fit_steps:
        command = [sys.executable, "-c", SHORT_FIT.format(steps=fit_steps)]
    command += ["convert", str(source), "-o", str(target), "--quiet", *options]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    error = process.stderr.read()
    # wait4 tells of this child alone; getrusage would give the largest of them all
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {error.strip()}")
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "options": " ".join(options),
        "seconds": time.perf_counter() - begin,
        "peak_bytes": usage.ru_maxrss * scale,
        "passed": usage.ru_maxrss * scale < CONVERT_BYTES,
    }


def mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.0f}"


def conversion_table(rows: list[dict]) -> str:
    lines = [
        f"| convert | seconds | peak MB | below {mb(CONVERT_BYTES)} |",
        "|---" * 4 + "|",
    ]
    for r in rows:
        cells = r["options"], f"{r['seconds']:.0f}", mb(r["peak_bytes"])
        lines.append(f"| {' | '.join(cells)} | {'yes' if r['passed'] else 'NO'} |")
    return "\n".join(lines)


def generation_table(rows: list[dict]) -> str:
    lines = [
        "| memory | predictor | budget MB | slots | MLX peak MB | baseline MB | "
        "peak MB | growth MB | growth − budget MB | kept | "
        "kB per token | tokens | s per token |",
        "|---" * 13 + "|",
    ]
    for r in rows:
        start = f"| {r['memory']} | {'on' if r['predictor'] else 'off'} | "
        if "error" in r:
            lines.append(f"{start}{r['error']} |" + " – |" * 10)
            continue
        flat = r["slope_bytes_per_token"]
        cells = [
            mb(r["budget_bytes"]),
            f"{r['slots'] / r['units']:.0%}",
            mb(r["mlx_peak_bytes"]),
            mb(r["baseline_bytes"]),
            mb(r["peak_bytes"]),
            mb(r["growth_bytes"]),
            f"{(r['growth_bytes'] - r['budget_bytes']) / 1e6:+,.0f}",
            "yes" if r["kept"] else "NO",
            "–" if flat is None else f"{flat / 1e3:+.1f}",
            str(r["tokens"]),
            f"{r['s_per_token']:.2f}",
        ]
        lines.append(start + " | ".join(cells) + " |")
    return "\n".join(lines)


def judge(row: dict) -> dict:
    """Whether a budget was kept, and whether memory stood still."""
    if "error" in row:
        return row
    over = row["growth_bytes"] - row["budget_bytes"]
    flat = row["slope_bytes_per_token"]
    return row | {
        "kept": over <= OVERHEAD_BYTES,
        "mlx_kept": row["mlx_peak_bytes"] <= row["budget_bytes"],
        "flat": None if flat is None else flat <= FLAT_BYTES,
    }


def machine() -> dict:
    import mlx.core as mx

    import mlx_flash

    return {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "mlx_flash": mlx_flash.__version__,
        "LD_PRELOAD": os.environ.get("LD_PRELOAD"),
    }


@click.command()
@click.option("--dims", default=2048, show_default=True, help="Model width.")
@click.option("--ffn", default=8192, show_default=True, help="Neurons of a layer.")
@click.option("--layers", default=24, show_default=True)
@click.option("--vocab", default=50272, show_default=True)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    default=["float16"],
    show_default=True,
    help="To convert to; the last one generates (MLX on a CPU is slow in float16).",
)
@click.option("--calibration-tokens", default=1024, show_default=True)
@click.option("--rank", type=int, help="Of predictors.  [default: the converter's]")
@click.option("--fit-steps", default=0, help="Shorten the fit.  [default: no]")
@click.option(
    "--memory",
    "budgets",
    multiple=True,
    default=["least", "30%", "50%", "100%"],
    show_default=True,
)
@click.option("--prompt", default=32, show_default=True, help="Tokens.")
@click.option("--tokens", default=32, show_default=True, help="With a predictor.")
@click.option("--exact-tokens", default=3, show_default=True, help="Without one.")
@click.option("--long", default=200, show_default=True, help="To look for leaks.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Keep the models there, and use them again.  [default: deleted at the end]",
)
@click.option("--child", hidden=True)
def main(child, folder, **options):
    """Measure the memory of converting and of generating on a synthetic OPT."""
    if child:
        print(json.dumps(generate_here(*json.loads(child))))
        return
    kept = folder is not None
    if not kept:
        folder = Path(tempfile.mkdtemp(dir="."))
    try:
        run(folder, **options)
    finally:
        if not kept:
            shutil.rmtree(folder)


def run(folder: Path, *, dims, ffn, layers, vocab, dtypes, budgets, **o):
    from synthetic import bar, numbers_text, opt_checkpoint

    source, text = folder / "checkpoint", folder / "numbers.txt"
    if not text.exists():
        opt_checkpoint(source, dims, ffn, layers, vocab)
        numbers_text(text, 4 * o["calibration_tokens"], vocab)
    source_bytes = sum(f.stat().st_size for f in source.iterdir())
    asked = ["--calibration-tokens", str(o["calibration_tokens"])]
    asked += ["--rank", str(o["rank"])] if o["rank"] is not None else []
    conversions = []
    for dtype in dtypes:
        target = folder / dtype
        facts = folder / f"{dtype}.json"  # of the conversion, for the next time
        if not facts.exists():
            short = [*asked, "--dtype", dtype]
            full = [*short, "--calibration", str(text), "--overwrite"]
            row = convert(source, target, full, o["fit_steps"])
            facts.write_text(json.dumps(row | {"options": " ".join(short)}))
        conversions.append(json.loads(facts.read_text()))
    smallest = least(target, o["prompt"], max(o["tokens"], o["long"]))
    plan = [(m, True, o["tokens"]) for m in budgets]
    plan += [(m, False, o["exact_tokens"]) for m in budgets]
    plan += [("50%", True, o["long"])] if o["long"] else []
    rows = []
    for memory, predictor, tokens in bar(plan, desc="generating", unit="run"):
        given = smallest if memory == "least" else memory
        row = judge(spawn(target, given, predictor, o["prompt"], tokens))
        rows.append(row | {"memory": memory})
    measured = [r for r in rows if "error" not in r]
    over = [r["growth_bytes"] - r["budget_bytes"] for r in measured]
    print(
        f"Synthetic OPT, {layers} layers, d_model {dims:,}, {ffn:,} neurons, "
        f"vocabulary {vocab:,}: {source_bytes / 1e9:.2f} GB in float16."
        + (f" Fits cut to {o['fit_steps']} steps." if o["fit_steps"] else "")
        + f"\n\n{conversion_table(conversions)}\n\nGenerating in {dtypes[-1]} after a "
        f"prompt of {o['prompt']} tokens; growth is the peak above the baseline, "
        f"imports alone, and kept if it is within {mb(OVERHEAD_BYTES)} MB of the "
        f"budget; kB per token is its rise over the second half of a run. Reads are "
        f"direct: no page cache is counted.\n\n{generation_table(rows)}\n\n"
        f"growth − budget: at most {max(over) / 1e6:+,.0f} MB, "
        f"at least {min(over) / 1e6:+,.0f} MB.\n"
    )
    facts = {
        "benchmark": "memory",
        "command": " ".join(sys.argv),
        "machine": machine(),
        "cache_state": "direct I/O; memory does not depend on it",
        "dims": dims,
        "ffn": ffn,
        "layers": layers,
        "vocab": vocab,
        "source_bytes": source_bytes,
        "fit_steps": o["fit_steps"] or None,
        "conversions": conversions,
        "overhead_bytes": OVERHEAD_BYTES,
        "rows": rows,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
