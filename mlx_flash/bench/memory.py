"""What converting and generating really hold in memory, against what was promised.

A synthetic OPT checkpoint is converted, then the result generates at several budgets,
each in a fresh process (`alone.py`). A process may grow by its budget and a fixed
overhead and no more, and must not grow from token to token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FlashError
from . import alone
from .opt import Shape, checkpoint, numbers_text
from .report import Column, Report, Row, progress

OVERHEAD_BYTES = 50_000_000  # what a process may grow by on top of its budget
CONVERT_BYTES = 1_000_000_000  # what converting a model of 3 GB may take
FLAT_BYTES = 10_000  # growth per token that counts as none
COLUMNS = [
    Column("budget MB", "budget_bytes", 1e6),
    Column("slots %", "slot_share", 0.01),
    Column("MLX peak MB", "memory_bytes", 1e6),
    Column("baseline MB", "baseline_bytes", 1e6),
    Column("peak MB", "peak_bytes", 1e6),
    Column("growth MB", "growth_bytes", 1e6),
    Column("growth − budget MB", "over_bytes", 1e6),
    Column("kept", "kept"),
    Column("kB more per token", "growth_per_token", 1e3, 1),
    Column("tokens", "tokens"),
    Column("ms per token", "total_ms"),
    Column("seconds", "seconds"),
]


@dataclass(frozen=True)
class Options:
    """`dtypes` to convert to, of which the last one generates; `long` is a run that
    looks for leaks, in tokens, and `exact_tokens` are made without a predictor."""

    dtypes: Sequence[str] = ("float16",)
    calibration_tokens: int = 1024
    rank: int | None = None
    fit_steps: int = 400  # memory does not depend on it
    budgets: Sequence[str] = ("least", "30%", "50%", "100%")
    prompt: int = 32
    tokens: int = 32
    exact_tokens: int = 3
    long: int = 200


def run(place: Path, shape: Shape, options: Options) -> Report:
    """A row for each conversion and for each budget, with and without a predictor.

    Args:
        place: Where checkpoint and flash folders are, or are written.
    """
    rows = [convert(place, shape, dtype, options) for dtype in options.dtypes]
    folder = place / options.dtypes[-1]
    least = smallest_budget(folder, options)
    plan = [(memory, True, options.tokens) for memory in options.budgets]
    plan += [(memory, False, options.exact_tokens) for memory in options.budgets]
    if options.long:
        plan.append(("50%", True, options.long))
    for memory, predictor, tokens in progress(plan, "generating", "run"):
        name = f"{memory}, {'predictor' if predictor else 'exact'}"
        try:
            row = alone.generate(
                name,
                folder,
                least if memory == "least" else memory,
                prompt_tokens=options.prompt,
                tokens=tokens,
                predictor=predictor,
            )
            rows.append(judge(row))
        except FlashError as error:
            rows.append(Row(name, more={"error": str(error)}))
    over = [r.more["over_bytes"] for r in rows if "over_bytes" in r.more]
    return Report("memory", rows, COLUMNS, _notes(shape, options, over), vars(options))


def convert(place: Path, shape: Shape, dtype: str, options: Options) -> Row:
    """Convert to `dtype`, or take what an earlier run noted of doing so."""
    noted = place / f"{dtype}.json"
    if not noted.exists():
        text = place / "numbers.txt"
        facts = alone.convert(
            checkpoint(place / "checkpoint", shape),
            place / dtype,
            dtype=dtype,
            calibration=str(
                numbers_text(text, 4 * options.calibration_tokens, shape.vocab)
            ),
            calibration_tokens=options.calibration_tokens,
            rank=options.rank,
            fit_steps=options.fit_steps,
            overwrite=True,
            progress=False,
        )
        noted.write_text(json.dumps(facts))
    facts = json.loads(noted.read_text())
    kept = facts["peak_bytes"] < CONVERT_BYTES
    return Row(f"convert to {dtype}", more=facts | {"kept": kept})


def smallest_budget(folder: Path, options: Options) -> str:
    """The smallest budget, as the refusal of a tiny one names it."""
    tokens = max(options.tokens, options.long)
    try:
        alone.generate("", folder, "1KB", prompt_tokens=options.prompt, tokens=tokens)
    except FlashError as error:
        return str(error).split("--memory ")[1].split()[0]
    raise AssertionError("A budget of 1 KB was not refused.")


def judge(row: Row) -> Row:
    """Note whether a budget was kept, and whether memory stood still."""
    more = row.more
    more["slot_share"] = more["slots"] / more["units"]
    more["over_bytes"] = more["growth_bytes"] - more["budget_bytes"]
    more["kept"] = more["over_bytes"] <= OVERHEAD_BYTES
    more["mlx_kept"] = (row.memory_bytes or 0) <= more["budget_bytes"]
    flat = more["growth_per_token"]
    more["flat"] = None if flat is None else flat <= FLAT_BYTES
    return row


def _notes(shape: Shape, options: Options, over: list[int]) -> list[str]:
    between = f"{min(over) / 1e6:+,.0f} to {max(over) / 1e6:+,.0f} MB" if over else "–"
    return [
        f"Synthetic OPT, {shape.layers} layers, width {shape.dims:,}, {shape.units:,} "
        f"neurons, vocabulary {shape.vocab:,}: {shape.nbytes / 1e9:.2f} GB in "
        f"{shape.dtype}; {options.fit_steps} fit steps.",
        f"Generating in {options.dtypes[-1]} after {options.prompt} prompt tokens; "
        "growth is the peak above the baseline, imports alone, and kept if it is "
        f"within {OVERHEAD_BYTES / 1e6:.0f} MB of the budget; kB more per token is its "
        "rise over the second half of a run. A conversion is kept if its whole process "
        f"stays below {CONVERT_BYTES / 1e9:.0f} GB.",
        f"growth − budget: {between}. Reads are direct: no page cache is counted.",
    ]
