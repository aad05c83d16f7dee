"""Does reading while MLX computes pay?

The same model three times: reading and computing in turn, what a layer lacks read while
the rest is multiplied, and also the next layer's guessed units read early.
"""

import contextlib
from typing import Annotated

import mlx.nn as nn
import numpy as np

from ..loading import load_model
from .options import VOCABULARY, Count, Memory, Model, model_or_opt, parse_shape
from .report import Column, Report, Row
from .turns import Turns

ROWS: dict[str, dict] = {
    "in turn": {"overlap": False},
    "overlap": {"overlap": True},
    "overlap, look-ahead": {"overlap": True, "look_ahead": True},
}
WARM = 16  # tokens that fill the slots
COLUMNS = [
    Column("median ms per token", "median_ms", 1, 1),
    Column("ms per token", "total_ms", 1, 1),
    Column("I/O ms", "io_ms", 1, 1),
    Column("cache ms", "cache_ms", 1, 1),
    Column("compute ms", "compute_ms", 1, 1),
    Column("of read time hidden, %", "hidden_share", 0.01),
    Column("MB per token", "bytes_per_token", 1e6, 2),
    Column("hit rate %", "hit_rate", 0.01, 1),
    Column("guesses right, %", "early_precision", 0.01),
    Column("times as fast (quartiles)", "faster"),
]


def run(
    model: Model = None,
    shape: Annotated[str, {"metavar": "LAYERSxDIMSxFFN"}] = "8x2048x8192",
    memory: Memory = "50%",
    tokens: Count = 96,
) -> Report:
    """Reading while MLX computes, and reading early, beside doing it in turn."""
    wanted = parse_shape(shape, VOCABULARY, "float32")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(model_or_opt(model, None, wanted, memory))
        models: dict[str, nn.Module] = {}
        for name, options in ROWS.items():
            options = {"context": tokens + WARM, "page_cache": "off"} | options
            loaded = load_model(folder, memory, **options)
            models[name], config = stack.enter_context(loaded)
        turns = Turns(models, WARM)
        rng = np.random.default_rng(0)
        turns.play(rng.integers(3, config["vocab_size"], tokens + WARM).tolist())
        rows = [_row(name, turns) for name in models]
    note = (
        f"{folder.name}, memory {memory}: {tokens} random tokens in turn after {WARM} "
        "others. The prediction of a synthetic model is SYNTHETIC."
    )
    return Report("overlap", rows, COLUMNS, [note])


def _row(name: str, turns: Turns) -> Row:
    row = turns.row(name, median_ms=turns.median_ms(name))
    if name != "in turn":
        row.more["faster"] = turns.ratio_text("in turn", name)
    return row
