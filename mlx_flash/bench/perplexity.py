"""What prediction costs in quality, and what a window saves in reads.

Perplexity of a text, dense (every neuron) against predicted, on a flash folder at a
given memory; then bytes per token while decoding the same text with windows of several
lengths, with LRU and with LRFU. Text is cut into pieces of 128 tokens that each begin
as the tokenizer begins a text.
"""

import math
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..demo_models import DEMO_MODEL
from ..errors import FlashError
from ..loading import load
from ..tracing import PIECE_TOKENS as LENGTH
from ..tracing import cut_text
from .options import Count, DemoModel, Memory, ShareType, Text
from .report import Column, Report, progress
from .turns import Turns

WARM = 16  # tokens of each piece that are not counted
POLICIES: dict[str, dict] = {
    **{f"window {k}": {"policy": "window", "window": k} for k in (1, 2, 4, 8)},
    "lru, all slots": {"policy": "lru"},
    "lrfu, all slots": {"policy": "lrfu"},
}
COLUMNS = [
    Column("MB per token", "bytes_per_token", 1e6, 3),
    Column("reads per token", "reads_per_token"),
    Column("hit rate %", "hit_rate", 0.01, 1),
]


def run(
    text: Text,
    model: DemoModel = DEMO_MODEL,
    memory: Memory = "50%",
    skip: Annotated[
        float | None, ShareType(), "Of a --skippable folder's neurons.  [default: none]"
    ] = None,
    tokens: Annotated[Count, "For perplexity."] = 65536,
    decode_tokens: Annotated[Count, "Per window."] = 1024,
) -> Report:
    """What prediction costs in quality on TEXT, and what windows save in reads."""
    with load(model, memory=memory, predictor=False, context=LENGTH) as loaded:
        pieces = cut(loaded[1], text, tokens)
        dense = perplexity(loaded[0], pieces)
    with load(model, memory=memory, context=LENGTH, skip=skip) as (net, _):
        predicted = perplexity(net, pieces)
        slots, lossy = net.flash.budget.slots, net.flash.lossy
        found = [x.predictor for x in net.flash.manifest.layers if x.predictor]
    some = pieces[: max(decode_tokens // LENGTH, 1)]
    rows = []
    for name, policy in POLICIES.items():
        options = {"context": LENGTH, "skip": skip} | policy
        with load(model, memory=memory, **options) as (net, _):
            turns = Turns({name: net}, WARM)
            for piece in some.tolist():
                turns.play(piece)
            rows.append(turns.row(name))
    cost = predicted / dense - 1
    note = (
        f"Perplexity on {pieces.size:,} tokens of {text.name}: dense {dense:.3f}, "
        f"{'skipping' if skip else 'predicted'} {predicted:.3f} ({cost:+.2%}), memory "
        f"{memory}."
    )
    facts = {
        "tokens": pieces.size,
        "dense": dense,
        "predicted": predicted,
        "cost": cost,
        "skip": skip,
        "slots": slots,
        "recall": [round(x.recall, 4) for x in found],
    }
    notes = [note, f"The model's own figures: {lossy}."] if lossy else [note]
    return Report("kept in memory", rows, COLUMNS, notes, facts)


def cut(tokenizer, text: Path, count: int) -> np.ndarray:
    """Pieces of a text, [rows, LENGTH] token ids, `count` in all."""
    pieces = cut_text(tokenizer, text.read_text())
    whole = [piece for piece in pieces if len(piece) == LENGTH]
    if not whole:
        raise FlashError(
            f"{text} is shorter than a piece of {LENGTH} tokens. Give a longer text."
        )
    return np.array(whole[: max(count // LENGTH, 1)])


def perplexity(model: nn.Module, rows: np.ndarray) -> float:
    """Of all tokens but the first of each row, given those before it."""
    for layer in model.flash.layers:
        if "predictor" in layer:  # predict for all: each token gets its own
            layer.sweep_tokens = rows.size
    loss = 0.0
    for row in progress(rows, "reading", "piece"):
        logits = model(mx.array(row[None]))[0, :-1].astype(mx.float32)
        own = mx.take_along_axis(logits, mx.array(row[1:, None]), axis=1)[:, 0]
        loss += float((mx.logsumexp(logits, axis=1) - own).sum())
    return math.exp(loss / (rows.size - len(rows)))
