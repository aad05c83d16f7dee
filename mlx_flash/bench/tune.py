"""What memory buys a model: speed and hit rate over budgets, and where to stop.

Short runs at several budgets say tokens/s as they are here. Beside their hit rates
stand those of one trace, replayed with each run's slots: short runs begin with empty
slots and count what they read first, the replay counts after the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.nn as nn
import numpy as np

from ..errors import FlashError
from ..generation import stream_generate
from ..layers.kinds import BLOCK, kind_of
from ..loading import load_model, load_tokenizer
from ..memory.system import usable_memory_bytes
from ..memory_size import say_memory
from ..planning.plan import make_plan
from ..prompts import context_for, encode_prompt
from ..run_report import RunReport
from ..sizing import policy_named
from ..traces.replay import hit_rate, replay
from ..traces.trace import Trace
from ..tracing import record_prompt
from .report import Column, Report, Row, progress

ENOUGH = 0.9  # of the best speed: more memory is not worth much then
COLUMNS = [
    Column("budget GB", "budget_bytes", 1e9, 3),
    Column("tokens/s", "tokens_per_s", 1, 2),
    Column("slowest to fastest", "spread"),
    Column("first token s", "first_token_s", 1, 2),
    Column("MB per token", "bytes_per_token", 1e6, 2),
    Column("hit rate %", "hit_rate", 0.01, 1),
    Column("hit rate % by the trace", "trace_hit_rate", 0.01, 1),
    Column("layers whole", "whole"),
]


def run(
    folder: Path, prompt: str, tokens: int = 32, budgets: int = 5, repeats: int = 3
) -> Report:
    """The rows of a model at so many budgets, from the least to the most useful.

    Args:
        folder: A flash folder, or a checkpoint that is streamed in place.
        prompt: What runs continue, greedily.
        tokens: New tokens of each run.
        budgets: How many.
        repeats: Of each budget; the run of median speed counts.

    Raises:
        FlashError: If the machine has no room for more than the least.
    """
    ids = encode_prompt(load_tokenizer(folder), prompt)
    context = context_for(folder, len(ids), tokens) or len(ids) + tokens
    sizes = _budgets(folder, context, budgets)
    trace = _trace(folder, sizes[0], ids, tokens, context)
    found: dict[int, list[Row]] = {size: [] for size in sizes}
    for size in progress(sizes * repeats, "measuring", "run"):
        found[size].append(_measured(folder, size, ids, tokens, context, trace))
    rows = [
        max(runs, key=lambda row: row.get("tokens_per_s")) for runs in found.values()
    ]
    best = knee(rows)
    note = (
        f"{folder.name}: {tokens} tokens after a prompt of {len(ids)}; the median of "
        f"{repeats} runs a budget, which take turns. {best.name} is the least that "
        f"reaches {ENOUGH:.0%} of the best speed."
    )
    return Report(
        "memory", rows, COLUMNS, [note], {"knee": best.name, "model": folder.name}
    )


def knee(rows: Sequence[Row]) -> Row:
    """The row of the least memory whose speed is nearly the best one."""
    best = max(map(_speed, rows))
    enough = [row for row in rows if _speed(row) >= ENOUGH * best]
    return min(enough, key=lambda row: row.get("budget_bytes"))


def _middle(runs: list[Row]) -> Row:
    """The run of median speed, with the slowest and fastest noted."""
    ranked = sorted(runs, key=_speed)
    row = ranked[len(ranked) // 2]
    row.more["spread"] = f"{_speed(ranked[0]):.2f} to {_speed(ranked[-1]):.2f}"
    return row


def _speed(row: Row) -> float:
    return row.get("tokens_per_s")


def _budgets(folder: Path, context: int, count: int) -> list[int]:
    """Budgets from the least that works to what holds everything or is free."""
    plan = make_plan(folder, "100%", context=context)
    least = round(1.05 * plan.least_bytes)
    # What lies beyond serves longer chunks of prompts, and no token.
    whole = least + round(1.05 * plan.ffn_bytes)
    most = min(plan.best_bytes, whole, usable_memory_bytes())
    if most <= least:
        raise FlashError(
            f"{folder} needs at least {say_memory(plan.least_bytes)}, and this machine "
            f"has {say_memory(most)} free: there is nothing to choose."
        )
    return [round(size) for size in np.linspace(least, most, count)]


def _trace(
    folder: Path, memory: int, ids: list[int], tokens: int, context: int
) -> Trace | None:
    """What a run asks for; None of blocks, which ask for everything."""
    with load_model(folder, memory, context=context) as (model, _):
        if kind_of(model.flash.manifest) is BLOCK:
            return None
        tokenizer = load_tokenizer(folder)
        return record_prompt(model, tokenizer, ids, tokens, sampler=None)


def _measured(
    folder: Path,
    memory: int,
    ids: list[int],
    tokens: int,
    context: int,
    trace: Trace | None,
) -> Row:
    with load_model(folder, memory, context=context) as (model, _):
        report = _report(model, load_tokenizer(folder), ids, tokens)
        slots = model.flash.budget.slots
        kind = kind_of(model.flash.manifest)
    policy = policy_named(kind.policy, kind)
    row = Row(say_memory(memory), tokens=report.generation_tokens)
    row.more = {
        "budget_bytes": memory,
        "tokens_per_s": report.tokens_per_s,
        "first_token_s": report.time_to_first_token_s,
        "hit_rate": report.hit_rate,
        "trace_hit_rate": hit_rate(replay(trace, policy, slots)) if trace else None,
        "whole": report.layers_held_whole,
    }
    row.bytes_per_token = report.bytes_per_token
    return row


def _report(model: nn.Module, tokenizer, ids: list[int], tokens: int) -> RunReport:
    for _ in stream_generate(model, tokenizer, ids, max_tokens=tokens):
        pass
    report = model.flash.report()
    if report.tokens_per_s is None:
        raise FlashError(
            "The model ended its answer with the first token, so that no token could "
            "be timed. Give another --prompt."
        )
    return report
