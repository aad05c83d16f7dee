"""One model on 1, 2 and 4 ranks of this machine, each with the same memory.

Bytes, hits, waits and sums are those that as many machines would have. Times are those
of ranks that share this machine's cores and disk; a slowed reader imitates a disk for
each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Annotated

import click

from ...errors import FlashError
from ...memory_size import parse_memory
from ...planning.outline import outline
from ..machine_state import machine_state, say_state
from ..options import Count, Folder, Memory, MemoryType, scratch
from ..report import Column, Report, Row, cache_state, progress
from .launch import launch
from .models import MODELS

Kinds = Annotated[
    tuple[str, ...], click.Choice(list(MODELS)), "Only this one; repeat it for more."
]
Ranks = Annotated[tuple[int, ...], click.IntRange(1), "So many; repeat it for more."]
Disk = Annotated[
    str | None,
    MemoryType(),
    "A second, for rows more in which every rank's disk is no faster: SYNTHETIC.",
    {"metavar": "SIZE"},
]
Limit = Annotated[int, click.IntRange(1), "Seconds that one run may take."]
COLUMNS = [
    Column("MB a rank per token", "rank_mb"),
    Column("of 1 rank's, %", "rank_share", 0.01),
    Column("all ranks, %", "all_share", 0.01),
    Column("held %", "held_share", 0.01),
    Column("hit rate %", "hit_rate", 0.01),
    Column("waits per token", "waits_per_token", 1, 1),
    Column("sums per token", "sums_per_token", 1, 1),
    Column("KB per sum", "bytes_per_sum", 1e3, 1),
    Column("ms in sums per token", "sum_ms"),
    Column("ms per token", "ms"),
    Column("tokens/s", "tokens_per_s", 1, 2),
    Column("times 1 rank", "speed_up", 1, 2),
]


@dataclass(frozen=True)
class Case:
    """A row: so many ranks with a model of one kind.

    Attributes:
        disk_rate: Bytes per second of the SYNTHETIC disk of each, 0 for this machine's.
    """

    kind: str
    ranks: int
    disk_rate: int = 0

    @property
    def name(self) -> str:
        name = f"{self.kind}, {self.ranks} rank{'s' if self.ranks > 1 else ''}"
        if not self.disk_rate:
            return name
        return f"{name}, SYNTHETIC disk of {self.disk_rate / 1e6:,.0f} MB/s each"


def run(
    folder: Folder = None,
    kind: Kinds = (),
    ranks: Ranks = (1, 2, 4),
    memory: Memory = "40%",
    prompt_tokens: Count = 32,
    warm_up: Annotated[Count, "Tokens that fill slots and do not count."] = 24,
    tokens: Count = 16,
    rounds: Count = 3,
    disk_rate: Disk = None,
    limit_s: Limit = 600,
) -> Report:
    """A model larger than one rank's memory, on several ranks of this machine.

    The memory is that of each rank: what all ranks hold grows with them.

    \b
    Examples:
      mlx-flash bench machines
      mlx-flash bench machines --kind blocks --ranks 1 --ranks 2 --disk-rate 50MB
    """
    rates = [0] if disk_rate is None else [0, _bytes_per_s(disk_rate)]
    counts = sorted(set(ranks))
    cases = [Case(k, n, rate) for rate in rates for k in kind or MODELS for n in counts]
    state = machine_state()
    with scratch(folder) as place:
        folders = {k: MODELS[k](place, memory) for k in kind or MODELS}
        sizes = {k: outline(found).manifest for k, found in folders.items()}
        given = {k: _of_model(memory, m.model_bytes) for k, m in sizes.items()}
        jobs: dict[str, dict] = {
            k: {
                "path": str(found.resolve()),
                "memory": given[k],
                "prompt_tokens": prompt_tokens,
                "warm_up": warm_up,
                "tokens": tokens,
            }
            for k, found in folders.items()
        }
        runs, failed = _measure(cases, jobs, rounds, limit_s)
    after = machine_state()
    rows = [
        row_of(case, runs[case], runs.get(Case(case.kind, 1, case.disk_rate), []))
        if case not in failed
        else Row.failed(case.name, failed[case])
        for case in cases
    ]
    measured = [found for of_case in runs.values() for found in of_case]
    direct = all(found["direct_io"] for found in measured)
    models = [
        f"{k}: {m.model_bytes / 1e6:,.0f} MB, of which {m.ffn_bytes / 1e6:,.0f} MB on "
        f"flash, and {given[k] / 1e6:,.0f} MB of memory a rank"
        for k, m in sizes.items()
    ]
    notes = [
        f"Random weights and random tokens. {'; '.join(models)}. {tokens} tokens that "
        f"count; medians of {rounds} rounds in changing order (least to most). Reads: "
        f"{cache_state(direct)}. Machine: {say_state(state, after)} Load "
        f"{after['load_average'][0]:.1f} after, that of the ranks included.",
        "All ranks share this machine's cores and disk, and a rank that waits keeps a "
        "core busy, because MLX's ring polls its sockets: with more ranks than cores "
        "times say little. Bytes, hits, waits and sums are what as many machines would "
        "have. Of ranks that differ, the least and the most are given. Hits are of "
        "units in layers that are not held whole. Sums are timed in a run of tokens "
        "of their own, in which every rank waits for each of them; that is also "
        "waiting for the slowest rank.",
    ]
    if disk_rate is not None:
        notes.append(
            f"SYNTHETIC disk: what a rank reads is held back until a disk of "
            f"{rates[-1] / 1e6:,.0f} MB/s of its own would have brought it."
        )
    facts = {"runs": {case.name: found for case, found in runs.items()}}
    return Report("model, ranks", rows, COLUMNS, notes, facts)


def _measure(
    cases: Sequence[Case], jobs: dict[str, dict], rounds: int, limit_s: int
) -> tuple[dict[Case, list[dict]], dict[Case, FlashError]]:
    """What every case found in each round, and why others found nothing."""
    runs: dict[Case, list[dict]] = {case: [] for case in cases}
    failed: dict[Case, FlashError] = {}
    order = [
        case
        for turn in range(rounds)
        for case in (*cases[turn % len(cases) :], *cases[: turn % len(cases)])
    ]
    for case in progress(order, "measuring", "run"):
        if case in failed:
            continue
        job = jobs[case.kind] | {"disk_rate": case.disk_rate}
        try:
            runs[case].append(launch(case.ranks, job, limit_s))
        except FlashError as error:
            failed[case] = error
    return runs, failed


def row_of(case: Case, runs: list[dict], single: list[dict]) -> Row:
    """The figures of a case beside those of one rank.

    Args:
        runs: What `rank.measure` found, round by round.
        single: The same of one rank, [] if nobody measured it.
    """
    tokens = len(runs[0]["seconds"])
    ranks = runs[0]["ranks"]  # of every round: the same tokens ask for the same units
    own = [rank["bytes_read"] / tokens for rank in ranks]
    hits, misses = (sum(rank[k] for rank in ranks) for k in ("hits", "misses"))
    ms = [1e3 * sum(found["seconds"]) / tokens for found in runs]
    sums = ranks[0]["sums"]
    more = {
        "rank_bytes": own,
        "rank_mb": _between([n / 1e6 for n in own]),
        "held_share": sum(sum(rank["slots"]) for rank in ranks) / runs[0]["units"],
        "hit_rate": hits / (hits + misses) if hits + misses else None,
        "waits_per_token": max(rank["waits"] for rank in ranks) / tokens,
        "sums_per_token": sums / tokens or None,
        "bytes_per_sum": ranks[0]["sum_bytes"] / sums if sums else None,
        "ms": f"{median(ms):,.0f} ({min(ms):,.0f} to {max(ms):,.0f})",
        "ms_per_token": median(ms),
        "tokens_per_s": 1e3 / median(ms),
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
    }
    if sums:
        of_rank = zip(*(found["sum_s"] for found in runs), strict=True)
        waited = [1e3 * median(values) / tokens for values in of_rank]
        more |= {"sum_ms_of_ranks": waited, "sum_ms": _between(waited)}
    if single:
        count = len(single[0]["seconds"])
        alone = single[0]["ranks"][0]["bytes_read"] / count
        alone_ms = median(1e3 * sum(found["seconds"]) / count for found in single)
        more["speed_up"] = alone_ms / median(ms)
        if alone:
            more["rank_share"] = max(own) / alone
            more["all_share"] = sum(own) / alone
    return Row(case.name, tokens=len(runs), bytes_per_token=sum(own), more=more)


def _between(values: list[float]) -> str:
    low, high = f"{min(values):,.1f}", f"{max(values):,.1f}"
    return low if low == high else f"{low} to {high}"


def _bytes_per_s(text: str) -> int:
    rate = parse_memory(text)
    if not isinstance(rate, int):
        raise FlashError(f"{text} is no rate of a disk. Try --disk-rate 50MB.")
    return rate


def _of_model(memory: str, model_bytes: int) -> int:
    """The memory of each rank in bytes."""
    found = parse_memory(memory)
    if found is None:
        raise FlashError("Every rank gets the same memory. Try --memory 40% or 90MB.")
    return int(found * model_bytes) if isinstance(found, float) else found
