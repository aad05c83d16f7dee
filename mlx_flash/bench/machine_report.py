"""One table that owners of a machine can paste: how fast it runs models from flash.

It takes less than five minutes: a probe, the demo model, a mixture of experts and an
OPT, each with memory for half of itself. The two large ones are written first, with
random weights, as large as the free disk and a minute of writing allow.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import click
import mlx.core as mx

from ..checkpoints.config import read_config
from ..demo_models import DEMO_MODEL
from ..errors import FlashError
from ..planning.probe import probe
from ..planning.text import profile_text
from . import alone, moe
from .machine_state import machine_state, say_state
from .opt import Shape, flash_folder
from .options import VOCABULARY, Count, Folder, make_shape, scratch
from .report import Column, Report, Row, cache_state

HALF = "50%"
WRITE_S = 30.0  # for each of the two models
DISK_SHARE = 0.25  # of what is free, for each of the two
EXPERT_LAYERS = (48, 24, 12, 6, 3, 1)  # Qwen3-30B-A3B has 48
OPT_LAYERS = (32, 16, 8, 4, 2)  # OPT-6.7B has 32
COLUMNS = [
    Column("on disk, GB", "model_bytes", 1e9, 3),
    Column("budget GB", "budget_bytes", 1e9, 3),
    Column("peak GB", "memory_bytes", 1e9, 3),
    Column("prompt s", "prompt_s", 1, 2),
    Column("tokens/s", "tokens_per_s", 1, 2),
    Column("ms per token", "total_ms", 1, 1),
    Column("I/O ms", "io_ms", 1, 1),
    Column("compute ms", "compute_ms", 1, 1),
    Column("MB per token", "bytes_per_token", 1e6, 2),
    Column("hit rate %", "hit_rate", 0.01, 1),
    Column("GB/s", "gb_per_s", 1, 2),
]


def run(
    folder: Folder = None,
    prompt_tokens: Count = 16,
    tokens: Annotated[int, click.IntRange(2)] = 24,
    write_s: Annotated[
        float, click.FloatRange(0), "For writing each of the two large models."
    ] = WRITE_S,
) -> Report:
    """This machine in one table: a probe and three models at half memory.

    Less than five minutes. Paste the table, and keep the JSON for `bench compare`.

    \b
    Example:
      mlx-flash bench report --json my-mac.json
    """
    before, rows = machine_state(), []
    with scratch(folder) as place:
        _say("measuring the flash, memory and MLX")
        profile = probe(None, lambda line: None)
        models: dict[str, Callable[[], Path]] = {
            "demo model": lambda: DEMO_MODEL,
            "mixture of experts, 4 bits": lambda: _experts(place, write_s),
            f"OPT, {_dtype()}": lambda: _opt(place, write_s),
        }
        for name, make in models.items():
            _say(f"running the {name}")
            try:
                rows.append(_measured(name, make(), prompt_tokens, tokens))
            except FlashError as error:
                rows.append(Row.failed(name, error))
    after = machine_state()
    direct = all(row.more.get("direct_io", True) for row in rows)
    notes = [
        profile_text(profile),
        "",
        f"Memory for half of each model; {tokens} tokens after a prompt of "
        f"{prompt_tokens}; reads {cache_state(direct)}. The two large models have "
        "random weights and routing, the worst case for a cache.",
        f"While it ran: {say_state(before, after)}",
    ]
    facts = {
        "model": "models at half memory",
        "state_before": before,
        "state_after": after,
        "profile": dataclasses.asdict(profile),
    }
    return Report("model", rows, COLUMNS, notes, facts)


def _measured(name: str, folder: Path, prompt_tokens: int, tokens: int) -> Row:
    return alone.generate(
        f"{name}, {read_config(folder)['num_hidden_layers']} layers",
        folder,
        HALF,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        warm_up=tokens // 2,
    )


def _experts(place: Path, write_s: float) -> Path:
    """A mixture of experts of Qwen3-30B-A3B's shape, of as many layers as go."""
    begin = time.perf_counter()
    one = moe.checkpoint(place / "experts-1", 1)
    layers = _affordable(EXPERT_LAYERS, one, time.perf_counter() - begin, write_s)
    if layers == 1:
        return one
    shutil.rmtree(one)
    return moe.checkpoint(place / f"experts-{layers}", layers)


def _opt(place: Path, write_s: float) -> Path:
    """An OPT of OPT-6.7B's width with predictors, of as many layers as go."""
    begin = time.perf_counter()
    small = flash_folder(place / "opt-1", _shape(1))
    seconds = time.perf_counter() - begin
    layers = _affordable(OPT_LAYERS, small, seconds, write_s)
    shutil.rmtree(place / "opt-1")
    return flash_folder(place / f"opt-{layers}", _shape(layers), HALF)


def _shape(layers: int) -> Shape:
    return make_shape(layers, 4096, 16384, VOCABULARY, _dtype())


def _dtype() -> str:
    """Half precision where it is fast: MLX's CPU backend computes it slowly."""
    return "float32" if mx.default_device() == mx.cpu else "float16"


def _affordable(
    choices: tuple[int, ...], one: Path, seconds: float, write_s: float
) -> int:
    """The most layers that time and disk allow, by what one layer took.

    The least choice if even that is too much: `have_room` refuses it then, in words.
    """
    nbytes = sum(f.stat().st_size for f in one.rglob("*") if f.is_file())
    room = DISK_SHARE * shutil.disk_usage(one).free
    fitting = [n for n in choices if n * seconds <= write_s and n * nbytes <= room]
    return max(fitting, default=min(choices))


def _say(line: str) -> None:
    click.echo(f"{line} …", err=True)
