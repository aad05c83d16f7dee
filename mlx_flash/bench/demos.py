"""Both demo models on a text: what is kept and read now, beside how it was before.

Every way decodes the same tokens in turn. Memory is set so that a share of each layer's
units has slots. Perplexity is that of the tokens that count, each way its own.
"""

import contextlib
import math
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import click
import mlx.nn as nn
import numpy as np

from .. import loading
from ..demo_models import DEMO_MODEL, DEMO_MOE
from ..errors import NotEnoughMemory
from ..loading import load, load_model
from ..memory_size import say_memory
from .machines.disk import slowed
from .options import FOLDER, Count, Text
from .perplexity import cut
from .report import Column, Report, Row, progress
from .turns import Turns

# How experts were kept before foresight, and what it does by and by
EXPERT_WAYS: dict[str, dict] = {
    "lru": {"policy": "lru", "look_ahead": False},
    "lrfu": {"policy": "lrfu", "look_ahead": False},
    "foresight": {"look_ahead": False},
    "foresight, early": {"look_ahead": True},
    "as loaded": {},
}
NEURON_WAYS: dict[str, dict] = {"lrfu": {}, "lru": {"policy": "lru"}}
LENGTH = 128
WARM = 32  # tokens of each piece that are not counted
COLUMNS = [
    Column("slots", "slots"),
    Column("memory", "memory"),
    Column("MB per token", "bytes_per_token", 1e6, 3),
    Column("reads per token", "reads_per_token", 1, 1),
    Column("hit rate %", "hit_rate", 0.01, 1),
    Column("begun early, %", "early_share", 0.01),
    Column("guesses right, %", "early_precision", 0.01),
    Column("I/O ms", "io_ms", 1, 2),
    Column("ms per token", "median_ms", 1, 1),
    Column("times as fast as the first (quartiles)", "faster"),
    Column("perplexity", "perplexity", 1, 3),
]


def run(
    text: Text,
    shares: Annotated[
        tuple[float, ...],
        click.FloatRange(0.01, 0.99),
        "Of each layer's units, how many have slots.",
    ] = (0.2, 0.5),
    tokens: Annotated[Count, "That are decoded."] = 512,
    disk_rate: Annotated[
        float, click.FloatRange(0), "MB/s of a slower, SYNTHETIC disk; 0 for the real."
    ] = 0.0,
    before: Annotated[
        Path | None, FOLDER, "An earlier demo model of neurons, to compare with."
    ] = None,
) -> Report:
    """What both demo models read of TEXT, and how fast, with what is kept and guessed.

    \b
    Example:
      mlx-flash bench demos stories.txt
    """
    rows: list[Row] = []
    slow = slowed(loading.open_reader, 1e6 * disk_rate)
    experts = {name: (DEMO_MOE, how) for name, how in EXPERT_WAYS.items()}
    neurons = {name: (DEMO_MODEL, how) for name, how in NEURON_WAYS.items()}
    if before is not None:
        neurons = {"before": (before, {})} | neurons
    patched = patch.object(loading, "open_reader", slow)
    with patched if disk_rate else contextlib.nullcontext():
        for share in shares:
            rows += _rows("experts", experts, share, text, tokens)
            rows += _rows("neurons", neurons, share, text, tokens)
    disk = f"a SYNTHETIC disk of {disk_rate:g} MB/s" if disk_rate else "the real disk"
    note = (
        f"{tokens} tokens of {text.name} in pieces of {LENGTH}, of which {WARM} only "
        f"fill slots; direct I/O, {disk}. Ways take turns token by token."
    )
    return Report("demos", rows, COLUMNS, [note])


def _rows(
    what: str,
    ways: dict[str, tuple[Path, dict]],
    share: float,
    text: Path,
    tokens: int,
) -> list[Row]:
    """A row for each way, all of which decode the same in turn."""
    names = {way: f"{what}, {share:.0%}: {way}" for way in ways}
    models: dict[str, nn.Module] = {}
    with contextlib.ExitStack() as stack:
        for way, (folder, how) in ways.items():
            memory = _memory_for(folder, share)
            options = {"context": LENGTH, "page_cache": "off"} | how
            model, tokenizer = stack.enter_context(load(folder, memory, **options))
            models[names[way]] = model
        turns = Turns(models, WARM)
        for piece in progress(cut(tokenizer, text, tokens).tolist(), names[way]):
            turns.play(piece)
        first = next(iter(models))
        rows = []
        for name, model in models.items():
            slots = model.flash.budget.slots
            row = turns.row(
                name,
                median_ms=turns.median_ms(name),
                slots=f"{np.mean(slots):.0f} of {model.flash.manifest.layers[0].units}",
                memory=say_memory(model.flash.budget.total_bytes),
                perplexity=math.exp(np.mean(turns.losses[name])),
            )
            if name != first:
                row.more["faster"] = turns.ratio_text(first, name)
            rows.append(row)
    return rows


def _memory_for(folder: Path, share: float) -> int:
    """The least memory that gives a share of the units slots, found by halving."""
    manifest_bytes = sum(file.stat().st_size for file in folder.rglob("*"))
    low, high = 0, 3 * manifest_bytes
    while high - low > 0.005 * manifest_bytes:
        middle = (low + high) // 2
        if _share_of(folder, middle) < share:
            low = middle
        else:
            high = middle
    return high


def _share_of(folder: Path, memory: int) -> float:
    try:
        with load_model(folder, memory, context=LENGTH) as (model, _):
            slots = sum(model.flash.budget.slots)
            return slots / sum(x.units for x in model.flash.manifest.layers)
    except NotEnoughMemory:
        return 0.0
