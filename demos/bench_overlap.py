"""Does reading while MLX computes pay?

The same model three times: reading and computing in turn, what a layer lacks read while
the rest is multiplied, and also the next layer's guessed units read early. All decode
the same tokens in turn, so that a busy machine slows them alike. Without --model, an
OPT of random float32 weights with synthetic predictors (a tenth selected, 2.4 % of a
layer read per token).
"""

import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

import mlx_flash
from mlx_flash.bench.synthetic import Shape, flash_folder

ROWS = {
    "in turn": {"overlap": False},
    "overlap": {"overlap": True},
    "overlap, look-ahead": {"overlap": True, "look_ahead": True},
}
WARM = 16  # tokens that fill the slots


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="Flash folder.")
@click.option("--shape", default="8x2048x8192", show_default=True)
@click.option("--memory", default="50%", show_default=True)
@click.option("--tokens", default=96, show_default=True)
def main(model, shape, memory, tokens):
    """Print a table of medians, and JSON."""
    with contextlib.ExitStack() as stack:
        if model is None:
            layers, dims, units = map(int, shape.split("x"))
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            heads = max(dims // 64, 1)
            sizes = Shape(layers, dims, units, heads, vocab=2048, dtype="float32")
            model = flash_folder(place, sizes, memory)
        nets, caches = {}, {}
        for name, options in ROWS.items():
            loaded = mlx_flash.load_model(
                model, memory, context=tokens + WARM, **options
            )
            nets[name], config = stack.enter_context(loaded)
            caches[name] = make_prompt_cache(nets[name])
        rng = np.random.default_rng(0)
        times = {name: [] for name in ROWS}
        for i in range(tokens + WARM):
            token = mx.array([[int(rng.integers(3, config["vocab_size"]))]])
            if i == WARM:
                before = {name: net.flash.stats.copy() for name, net in nets.items()}
            for name in list(ROWS)[i % len(ROWS) :] + list(ROWS)[: i % len(ROWS)]:
                begin = time.perf_counter()
                mx.eval(nets[name](token, cache=caches[name]))
                times[name].append(1e3 * (time.perf_counter() - begin))
        report = {}
        head = "| | ms per token | I/O | compute and cache | of read time hidden |"
        print(head + " MB per token | hits | guesses right |")
        print("| --- " * 8 + "|")
        for name, net in nets.items():
            s = net.flash.stats - before[name]
            ms = times[name][WARM:]
            io = 1e3 * s.io_s / tokens
            low, total, high = statistics.quantiles(ms, n=4)
            right = s.early_precision
            report[name] = {"total_ms": ms, "io_ms": io, "right": right}
            print(
                f"| {name} | {total:.1f} ({low:.1f} to {high:.1f}) | {io:.1f} | "
                f"{statistics.mean(ms) - io:.1f} | {s.read_hidden_share or 0:.0%} | "
                f"{s.bytes_read / tokens / 1e6:.2f} | {s.hit_rate:.1%} | "
                + ("–" if right is None else f"{right:.0%}")
                + " |"
            )
        plain = np.array(times["in turn"][WARM:])
        for name in list(ROWS)[1:]:
            ratio = plain / np.array(times[name][WARM:])
            low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
            print(f"{name}: {middle:.2f} times as fast ({low:.2f} to {high:.2f})")
            report[name]["ratio"] = middle
        print(json.dumps({k: v | {"total_ms": None} for k, v in report.items()}))


if __name__ == "__main__":
    main()
