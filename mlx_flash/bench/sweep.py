"""How speed, bytes per token and hit rate depend on the memory a model is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from ..errors import FlashError
from .decode import Run, run_model
from .report import Column, Report, Row, cache_state, progress

COLUMNS = [
    Column("budget MB", "budget_bytes", 1e6, 1),
    Column("peak MB", "memory_bytes", 1e6, 1),
    Column("tokens/s", "tokens_per_s", 1, 2),
    Column("MB per token", "bytes_per_token", 1e6, 3),
    Column("reads per token", "reads_per_token"),
    Column("hit rate %", "hit_rate", 0.01, 1),
    Column("I/O ms", "io_ms", 1, 2),
    Column("cache ms", "cache_ms", 1, 2),
    Column("compute ms", "compute_ms", 1, 2),
    Column("total ms", "total_ms", 1, 2),
]


def run(
    folder: Path,
    budgets: Sequence[str],
    tokens: int = 32,
    prompt_tokens: int = 32,
    repeats: int = 2,
) -> Report:
    """A row for each budget, greedily continuing a prompt of random tokens.

    Each repeat goes through all budgets, so that a slow spell does not hit one alone.
    A budget that is refused keeps its row, with the reason.
    """
    found: dict[str, list[Run]] = {memory: [] for memory in budgets}
    errors: dict[str, str] = {}
    for memory in progress(list(budgets) * repeats, "measuring", "run"):
        if memory in errors:
            continue
        try:
            found[memory].append(
                run_model(folder, memory, prompt_tokens, tokens, greedy=True)
            )
        except FlashError as error:
            errors[memory] = str(error)
    rows = [
        Row(memory, more={"error": errors[memory]})
        if memory in errors
        else _row(memory, runs)
        for memory, runs in found.items()
    ]
    facts_of_runs = [run.facts for runs in found.values() for run in runs]
    direct = all(run["direct_io"] for run in facts_of_runs)
    model_bytes = max((run["model_bytes"] for run in facts_of_runs), default=None)
    size = "" if model_bytes is None else f", {model_bytes / 1e9:.3f} GB"
    notes = [
        f"{folder.name}{size}: {repeats} runs a budget, each {tokens} tokens after a "
        f"prompt of {prompt_tokens} random ones; {cache_state(direct)}. ± is the "
        "deviation over tokens. Peak is what MLX allocated."
    ]
    facts = {
        "model": str(folder),
        "model_bytes": model_bytes,
        "cache_state": cache_state(direct),
        "repeats": repeats,
    }
    return Report("sweep", rows, COLUMNS, notes, facts)


def _row(memory: str, runs: list[Run]) -> Row:
    row = Row.of(
        memory,
        [sample for run in runs for sample in run.samples],
        max(run.peak_bytes for run in runs),
        budget_bytes=runs[-1].facts["budget_bytes"],
        slots=runs[-1].facts["slots"],
        runs_tokens_per_s=[
            1e3 / mean(sample.total_ms for sample in run.samples) for run in runs
        ],
    )
    if row.total_ms:
        row.more["tokens_per_s"] = 1e3 / row.total_ms
    return row
