"""What converting and generating really hold in memory, against what was promised.

A synthetic OPT checkpoint is converted by the command line in a process of its own, then
the result generates at several budgets, each in a fresh process. Growth is what a
process's resident memory rises, at its peak, above what Python and the libraries take
once they are imported. It may exceed the budget by a fixed overhead and no more, and it
must not rise from token to token.
"""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click

OVERHEAD_BYTES = 100_000_000  # promised on top of a budget: see the table's last rows
CONVERT_BYTES = 1_000_000_000  # promised for any conversion of a model of this size
MIB_PER_1000 = 1.0  # growth per 1,000 tokens that counts as flat


def peak_child_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Watch(threading.Thread):
    """The resident memory of this process, ten times a second, and its peak."""

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


def child(folder: str, memory: str, predictor: bool, prompt: int, tokens: int) -> dict:
    """Load and generate, greedily from random token ids; returns what it took."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    import mlx_flash.generation  # noqa: F401 - part of the baseline
    import mlx_flash.loader
    from mlx_flash.budget import KV_STEP

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
    """`child` in a fresh process; a refused budget comes back as `error`."""
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


def convert(source: Path, target: Path, options: list[str]) -> dict:
    """Run `mlx-flash convert`; seconds and peak resident bytes of its process."""
    command = [sys.executable, "-m", "mlx_flash.cli", "convert", str(source)]
    command += ["-o", str(target), "--quiet", *options]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds = time.perf_counter() - begin
    return {"options": options, "seconds": seconds, "peak_bytes": peak_child_bytes()}
