"""How speed, bytes per token and hit rate depend on the memory a model is given."""

from typing import Annotated

import click

from ..demo_models import DEMO_MODEL
from ..errors import FlashError
from .decode import run_model
from .options import Budgets, Count, DemoModel, PageCache
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
    model: Annotated[
        DemoModel, "Flash folder, or an mlx-lm checkpoint with experts."
    ] = DEMO_MODEL,
    memory: Annotated[
        Budgets,
        "A budget; repeat it for more.",
        {"show_default": "40% to 100% in tenths"},
    ] = ("40%", "50%", "60%", "70%", "80%", "90%", "100%"),
    tokens: Annotated[int, click.IntRange(2)] = 32,
    prompt_tokens: Count = 32,
    repeats: Count = 2,
    page_cache: PageCache = "off",
) -> Report:
    """Tokens/s, bytes per token and hit rate over memory budgets.

    \b
    Examples:
      mlx-flash bench sweep --plot sweep.png
      mlx-flash bench sweep --model opt-6.7b-flash --memory 7GB --memory 9GB
    """
    found: dict[str, list[Row]] = {budget: [] for budget in memory}
    errors: dict[str, str] = {}
    # Each repeat goes through all budgets, so that a slow spell does not hit one alone.
    for budget in progress(list(memory) * repeats, "measuring", "run"):
        if budget in errors:
            continue
        try:
            run = run_model(
                budget,
                model,
                budget,
                prompt_tokens,
                tokens,
                greedy=True,
                page_cache=page_cache,
            )
            found[budget].append(run)
        except FlashError as error:
            errors[budget] = str(error)
    rows = [
        Row.failed(budget, errors[budget]) if budget in errors else _row(budget, runs)
        for budget, runs in found.items()
    ]
    facts_of_runs = [run.more for runs in found.values() for run in runs]
    direct = all(facts["direct_io"] for facts in facts_of_runs)
    model_bytes = max((facts["model_bytes"] for facts in facts_of_runs), default=None)
    size = "" if model_bytes is None else f", {model_bytes / 1e9:.3f} GB"
    notes = [
        f"{model.name}{size}: {repeats} runs a budget, each {tokens} tokens after a "
        f"prompt of {prompt_tokens} random ones; {cache_state(direct)}. ± is the "
        "deviation over tokens. Peak is what MLX allocated."
    ]
    facts = {
        "model": model.name,
        "model_bytes": model_bytes,
        "cache_state": cache_state(direct),
    }
    return Report("sweep", rows, COLUMNS, notes, facts)


def _row(memory: str, runs: list[Row]) -> Row:
    return Row.of(
        memory,
        [sample for run in runs for sample in run.samples],
        max(run.memory_bytes or 0 for run in runs),
        budget_bytes=runs[-1].more["budget_bytes"],
        slots=runs[-1].more["slots"],
        runs_tokens_per_s=[run.more["tokens_per_s"] for run in runs],
    )
