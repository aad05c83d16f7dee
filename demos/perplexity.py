"""What prediction costs in quality, and what a window saves in reads.

Perplexity of a text, dense (every neuron) against predicted, on a flash folder at a
given memory; then bytes per token while decoding the same text with windows of several
lengths and with LRU. Text is cut into pieces of 128 tokens that each begin as the
tokenizer begins a text.
"""

import json
import math
import sys
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

import mlx_flash
from mlx_flash.cli.common import DEMO_MODEL
from mlx_flash.memory.stats import Stats

LENGTH = 128  # half the model's size has little room for a longer KV cache


def pieces(tokenizer, text: Path, count: int, length: int = LENGTH) -> np.ndarray:
    ids = tokenizer.encode(text.read_text(), add_special_tokens=False, verbose=False)
    start = tokenizer.encode("", add_special_tokens=True)[:1]
    body = length - len(start)
    rows = [ids[i : i + body] for i in range(0, len(ids) - body, body)]
    return np.array([start + row for row in rows[: max(count // length, 1)]])


def perplexity(model, rows: np.ndarray) -> float:
    """Of all tokens but the first of each row, given those before it."""
    for layer in model.flash.layers:
        layer.sweep_tokens = rows.size  # predict for all: each token gets its own
    loss = 0.0
    for row in tqdm(rows, leave=False, disable=not sys.stderr.isatty()):
        logits = model(mx.array(row[None]))[0, :-1].astype(mx.float32)
        own = mx.take_along_axis(logits, mx.array(row[1:, None]), axis=1)[:, 0]
        loss += (mx.logsumexp(logits, axis=1) - own).sum().item()
    return math.exp(loss / (rows.size - len(rows)))


def decode(model, rows: np.ndarray, warm: int = 16) -> Stats:
    """The counters of feeding `rows` token by token, after the first few."""
    total = None
    for row in rows:
        cache = make_prompt_cache(model)
        for i, token in enumerate(row):
            if i == warm:
                before = model.flash.stats.copy()
            mx.eval(model(mx.array([[int(token)]]), cache=cache))
        spent = model.flash.stats - before
        total = spent if total is None else total + spent
    return total


@click.command()
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option("--model", default=str(DEMO_MODEL), show_default="the demo model")
@click.option("--memory", default="50%", show_default=True)
@click.option("--tokens", default=65536, show_default=True, help="For perplexity.")
@click.option("--decode-tokens", default=1024, show_default=True, help="Per window.")
def main(text, model, memory, tokens, decode_tokens):
    """Measure TEXT with and without prediction, and with windows."""
    result = {"model": str(model), "memory": memory, "text": text.name}
    with mlx_flash.load(model, memory=memory, predictor=False, context=LENGTH) as (
        net,
        tokenizer,
    ):
        rows = pieces(tokenizer, text, tokens)
        result |= {"tokens": rows.size, "dense": perplexity(net, rows)}
    with mlx_flash.load(model, memory=memory, context=LENGTH) as (net, _):
        result["predicted"] = perplexity(net, rows)
        result["slots"] = net.flash.budget.slots
        found = [x.predictor for x in net.flash.manifest.layers]
        result["recall"] = [round(x.recall, 4) for x in found]
    result["cost"] = result["predicted"] / result["dense"] - 1
    print(
        f"perplexity on {rows.size:,} tokens of {text.name}: dense "
        f"{result['dense']:.3f}, predicted {result['predicted']:.3f} "
        f"({result['cost']:+.2%})\n"
    )
    print("| kept in memory | MB per token | reads per token | hit rate |")
    print("|---|---|---|---|")
    result["windows"] = {}
    some = rows[: max(decode_tokens // rows.shape[1], 1)]
    steps = some.size - 16 * len(some)
    for window in (1, 2, 4, 8, "lru", "lrfu"):
        policy = {"policy": window}
        if isinstance(window, int):
            policy = {"policy": "window", "window": window}
        with mlx_flash.load(model, memory=memory, context=LENGTH, **policy) as (net, _):
            spent = decode(net, some)
        name = f"window {window}" if isinstance(window, int) else f"{window}, all slots"
        per_token = spent.bytes_read / steps, spent.reads / steps
        print(
            f"| {name} | {per_token[0] / 1e6:.3f} | {per_token[1]:.0f} | "
            f"{spent.hit_rate:.1%} |"
        )
        result["windows"][name] = [*per_token, spent.hit_rate]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
