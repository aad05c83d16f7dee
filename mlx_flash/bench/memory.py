"""What converting and generating really hold in memory, against what was promised.

A synthetic OPT checkpoint is converted, then the result generates at several budgets,
each in a fresh process (`alone.py`). A process may grow by its budget and a fixed
overhead and no more, and must not grow from token to token.
"""

import json
from pathlib import Path
from typing import Annotated

import click

from ..errors import FlashError
from ..planning.plan import make_plan
from . import alone
from .opt import Shape, checkpoint, numbers_text
from .options import DTYPE, OPT_VOCAB, Count, Folder, make_shape, scratch
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


def run(
    dims: Annotated[Count, "Model width."] = 2048,
    ffn: Annotated[Count, "Neurons of a layer."] = 8192,
    layers: Count = 24,
    vocab: Annotated[int, click.IntRange(8)] = OPT_VOCAB,
    dtype: Annotated[
        tuple[str, ...],
        DTYPE,
        "To convert to; the last one generates (MLX on a CPU is slow in float16).",
    ] = ("float16",),
    calibration_tokens: Count = 1024,
    rank: Annotated[
        int | None, click.INT, "Of predictors.  [default: the converter's]"
    ] = None,
    fit_steps: Annotated[Count, "Of a predictor; memory does not depend on it."] = 400,
    memory: Annotated[
        tuple[str, ...], "A budget, or the least that works; repeat it for more."
    ] = ("least", "30%", "50%", "100%"),
    prompt: Annotated[Count, "Tokens."] = 32,
    tokens: Annotated[Count, "With a predictor."] = 32,
    exact_tokens: Annotated[Count, "Without one."] = 3,
    long: Annotated[int, "To look for leaks."] = 200,
    folder: Folder = None,
) -> Report:
    """What processes that convert and generate hold, against what was promised.

    \b
    Examples:
      mlx-flash bench memory --dtype float16 --dtype float32 --fit-steps 12
      mlx-flash bench memory --dims 256 --ffn 2048 --layers 2 --vocab 2048
    """
    shape = make_shape(layers, dims, ffn, vocab, "float16")
    fit = {
        "calibration_tokens": calibration_tokens,
        "rank": rank,
        "fit_steps": fit_steps,
    }
    plan = [(budget, "predictor", tokens) for budget in memory]
    plan += [(budget, "exact", exact_tokens) for budget in memory]
    if long:
        plan.append(("50%", "predictor", long))
    with scratch(folder) as place:
        rows = [convert(place, shape, wanted, fit) for wanted in dtype]
        model = place / dtype[-1]
        context = prompt + max(tokens, long) + 2
        least = str(make_plan(model, context=context).least_bytes)
        for budget, kind, count in progress(plan, "measuring", "run"):
            name = f"{budget}, {kind}"
            given = least if budget == "least" else budget
            options = {
                "prompt_tokens": prompt,
                "tokens": count,
                "predictor": kind == "predictor",
            }
            try:
                rows.append(judge(alone.generate(name, model, given, **options)))
            except FlashError as error:
                rows.append(Row.failed(name, error))
    over = [r.more["over_bytes"] for r in rows if "over_bytes" in r.more]
    between = f"{min(over) / 1e6:+,.0f} to {max(over) / 1e6:+,.0f} MB" if over else "–"
    return Report(
        "memory",
        rows,
        COLUMNS,
        [
            f"Synthetic OPT, {layers} layers, width {dims:,}, {ffn:,} neurons, "
            f"vocabulary {vocab:,}: {shape.nbytes / 1e9:.2f} GB in {shape.dtype}; "
            f"{fit_steps} fit steps.",
            f"Generating in {dtype[-1]} after {prompt} prompt tokens; growth is the "
            "peak above the baseline, imports alone, and kept if it is within "
            f"{OVERHEAD_BYTES / 1e6:.0f} MB of the budget; kB more per token is its "
            "rise over the second half of a run. A conversion is kept if its whole "
            f"process stays below {CONVERT_BYTES / 1e9:.0f} GB.",
            f"growth − budget: {between}. Reads are direct: no page cache is counted.",
        ],
    )


def convert(place: Path, shape: Shape, dtype: str, fit: dict) -> Row:
    """Convert to `dtype`, or take what an earlier run noted of doing so."""
    noted = place / f"{dtype}.json"
    if not noted.exists():
        text = place / "numbers.txt"
        numbers_text(text, 4 * fit["calibration_tokens"], shape.vocab)
        facts = alone.convert(
            checkpoint(place / "checkpoint", shape),
            place / dtype,
            dtype=dtype,
            calibration=str(text),
            overwrite=True,
            progress=False,
            **fit,
        )
        noted.write_text(json.dumps(facts))
    facts = json.loads(noted.read_text())
    kept = facts["peak_bytes"] < CONVERT_BYTES
    return Row(f"convert to {dtype}", more=facts | {"kept": kept})


def judge(row: Row) -> Row:
    """Note whether a budget was kept, and whether memory stood still."""
    more = row.more
    more["over_bytes"] = more["growth_bytes"] - more["budget_bytes"]
    more["kept"] = more["over_bytes"] <= OVERHEAD_BYTES
    more["mlx_kept"] = (row.memory_bytes or 0) <= more["budget_bytes"]
    flat = more["growth_per_token"]
    more["flat"] = None if flat is None else flat <= FLAT_BYTES
    return row
