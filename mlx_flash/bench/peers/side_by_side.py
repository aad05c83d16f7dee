"""A long prompt and some tokens in several engines, at the same peak of memory.

All engines read the same checkpoint of random weights and get the same tokens. Each run
is a process of its own; rounds follow one another in changing order, and a cell is the
median of the rounds.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import click

from ...checkpoints.tokenizer import load_tokenizer
from ...errors import FlashError
from ...memory_size import parse_memory
from ..report import Column, Report, Row, progress
from .engines import Engine, Measured, fit, measure, middle, python_of, version_in
from .guest.script import AHEAD, Job

Pythons = Annotated[
    tuple[str, ...],
    click.STRING,
    "Of an environment that has engines which this one lacks; repeat it for more.",
    {"metavar": "PYTHON"},
]
Rounds = Annotated[int, click.IntRange(1)]
Only = Annotated[
    tuple[str, ...],
    click.STRING,
    "Run this engine.  [default: all]",
    {"metavar": "NAME"},
]
COLUMNS = [
    Column("peak of MLX, MB", "peak_bytes"),
    Column("growth of the process, MB", "growth_bytes"),
    Column("first token, s", "prompt_s"),
    Column("its CPU s", "prompt_cpu_s"),
    Column("its MB from disk", "prompt_disk"),
    Column("its MB asked for", "prompt_asked"),
    Column("tokens/s", "tokens_per_s"),
    Column("CPU ms per token", "token_cpu_s"),
    Column("MB asked for per token", "token_asked"),
    Column("hit rate %", "hit_rate"),
    Column("same tokens", "agree"),
]
# of a figure: what it is divided by, and its digits
SCALES = {
    "peak_bytes": (1e6, 1),
    "growth_bytes": (1e6, 0),
    "prompt_s": (1, 1),
    "prompt_cpu_s": (1, 1),
    "prompt_disk": (1e6, 0),
    "prompt_asked": (1e6, 0),
    "tokens_per_s": (1, 1),
    "token_cpu_s": (1e-3, 0),
    "token_asked": (1e6, 3),
    "hit_rate": (0.01, 1),
}


def compare(
    engines: Sequence[Engine],
    job: Job,
    memory: str,
    model_bytes: int,
    rounds: int,
    pythons: Sequence[str],
    log: Callable[[str], None] = lambda line: click.echo(line, err=True),
) -> tuple[list[Row], dict]:
    """Find each engine's memory option, then run all of them in turn.

    Returns:
        The rows, and facts for the report: the budget, and every single run.

    Raises:
        FlashError: If `memory` is no size.
    """
    share = parse_memory(memory)
    if share is None:
        raise FlashError("All get the same memory. Try --memory 60% or 102MB.")
    budget = int(share * model_bytes) if isinstance(share, float) else share
    failed: dict[str, FlashError] = {}
    jobs: dict[str, tuple[str, Job]] = {}
    for engine in progress(engines, "fitting memory", "engine"):
        try:
            python = python_of(engine, pythons)
            option = budget
            if engine.fitted:
                option = fit(engine, python, job | {"memory": budget})
                log(f"{engine.name}: {option / 1e6:.1f} MB")
            jobs[engine.name] = python, job | {"memory": option}
        except FlashError as error:
            failed[engine.name] = error
    runs: dict[str, list[Measured]] = {name: [] for name in jobs}
    present = [engine for engine in engines if engine.name in jobs]
    for turn in progress(range(rounds), "measuring", "round"):
        first = turn % max(len(present), 1)
        for engine in present[first:] + present[:first]:
            try:
                done = measure(engine, *jobs[engine.name])
            except FlashError as error:
                failed[engine.name] = error
                continue
            runs[engine.name].append(done)
            log(f"{engine.name}: {done.prompt_s:.1f} s, {done.tokens_per_s:.1f}/s")
    reference = next((runs[e.name] for e in present if e.resident and runs[e.name]), [])
    rows = [
        row_of(engine.name, runs[engine.name], reference)
        if runs.get(engine.name)
        else Row.failed(engine.name, failed[engine.name])
        for engine in engines
    ]
    facts = {
        "budget_bytes": budget,
        "model_bytes": model_bytes,
        "memory_options": {name: job["memory"] for name, (_, job) in jobs.items()},
        "versions_of_engines": {
            engine.package: version_in(jobs[engine.name][0], engine.package)
            for engine in present
        },
        "runs": {name: [vars(run) for run in found] for name, found in runs.items()},
    }
    return rows, facts


def row_of(name: str, runs: list[Measured], reference: list[Measured]) -> Row:
    """The medians of an engine's runs, with least and most where they differ."""
    more = {
        key: spread([getattr(run, key, run.facts.get(key)) for run in runs], key)
        for key in SCALES
    }
    if reference:
        pairs = zip(runs[0].best, reference[0].best, strict=True)
        equal = sum(a == b for a, b in pairs)
        more["agree"] = f"{equal} of {len(runs[0].best)}"
    return Row(name, tokens=len(runs), more=more)


def spread(values: list[float | None], key: str) -> str | None:
    """Median (least to most)."""
    scale, digits = SCALES[key]
    known = [value / scale for value in values if value is not None]
    if not known:
        return None
    low, high = f"{min(known):,.{digits}f}", f"{max(known):,.{digits}f}"
    text = f"{middle(known):,.{digits}f}"
    return text if low == high else f"{text} ({low} to {high})"


def report(
    name: str,
    what: str,
    engines: Sequence[Engine],
    folder: Path,
    job: Job,
    memory: str,
    rounds: int,
    only: Sequence[str],
    pythons: Sequence[str],
) -> Report:
    """Compare, and say what the figures mean.

    Args:
        what: The model, in words.
        folder: Of the checkpoint.

    Raises:
        FlashError: If nothing is called as `only` says.
    """
    chosen = [e for e in engines if not only or e.kind in only]
    if not chosen:
        known = ", ".join(sorted({e.kind for e in engines}))
        raise FlashError(f"No engine is called {' or '.join(only)}. Try {known}.")
    model_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    rows, facts = compare(chosen, job, memory, model_bytes, rounds, pythons)
    notes = [
        f"{what}: {model_bytes / 1e6:,.1f} MB; memory "
        f"{facts['budget_bytes'] / 1e6:,.0f} MB; {job['prompt_tokens']} prompt tokens, "
        f"then {job['warm_up']} and {job['tokens']} that count.",
        "Each run is a process of its own, whose files were dropped from the page "
        f"cache before; medians of {rounds} rounds in changing order (least to most). "
        "Peak of MLX is active and cached arrays; the memory option of each engine was "
        "searched for until that came near the budget. Growth is resident memory above "
        "imports, mapped files included. MB from disk is the system's count for the "
        "process; what an engine reads again through the page cache is not in it, and "
        "that cache is in no column. MB asked for is what its read calls returned.",
        "Same tokens: at how many steps the likeliest token is that of mlx-lm.",
    ]
    return Report(name, rows, COLUMNS, notes, facts)


def text_ids(folder: Path, text: Path, job: Job) -> list[int]:
    """The tokens of a text that a job needs.

    Raises:
        FlashError: If it is too short.
    """
    ids = load_tokenizer(folder).encode(text.read_text(), add_special_tokens=True)
    count = job["prompt_tokens"] + 1 + job["warm_up"] + job["tokens"] + AHEAD
    if len(ids) < count:
        raise FlashError(f"{text} has {len(ids)} of {count} tokens. Give a longer one.")
    return ids[:count]


def make_job(folder: Path, scratch: Path, prompt: int, tokens: int, vocab: int) -> Job:
    """What all engines are told."""
    return {
        "path": str(folder),
        "scratch": str(scratch),
        "prompt_tokens": prompt,
        "warm_up": max(tokens // 4, 1),
        "tokens": tokens,
        "vocab": vocab,
    }
