"""Judge caches on a recorded trace: hit rates by policy and budget, without the model.

Policies run on the engine's own `SlotCache`, so that a figure here is what a run with
as many slots counts. Beside them stands what no policy can exceed: Belady's optimum,
which knows the future and keeps what is wanted soonest.
"""

from collections.abc import Sequence

import numpy as np

from ..memory.policies import Foreseen, Lrfu, Lru, Window
from ..memory.slot_cache import SlotCache
from ..tables import Table
from .trace import Trace

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
WINDOWS = (1, 4)
OPTIMUM = "optimum"

Step = tuple[np.ndarray, int, np.ndarray]  # as `Trace.steps` gives them
Counts = list[tuple[int, int]]  # (hits, asked) of each layer


def replay(trace: Trace, policy: Lru | None, slots: Sequence[int]) -> Counts:
    """(hits, asked) of each layer after its warm steps.

    Args:
        policy: As the engine takes it; None for Belady's optimum.
        slots: Of each layer.
    """
    counts = []
    for layer, n_slots in enumerate(slots):
        steps = list(trace.steps(layer))
        if policy is None:
            hits = _optimum(steps, trace.units[layer], n_slots)
        else:
            cache = SlotCache(trace.units[layer], n_slots, policy)
            hits = _engine(steps, cache, trace.soon[layer] if trace.soon else None)
        asked = [len(units) for units, *_ in steps]
        warm = trace.warm[layer]
        counts.append((sum(hits[warm:]), sum(asked[warm:])))
    return counts


def hit_rate(counts: Counts) -> float:
    """Over all layers, as the engine reports it."""
    hits, asked = np.sum(counts, axis=0)
    return float(hits / asked) if asked else 0.0


def even_slots(trace: Trace, share: float) -> tuple[int, ...]:
    """The same share of every layer's units, at least one."""
    return tuple(min(max(int(share * n), 1), n) for n in trace.units)


def compare(
    trace: Trace,
    shares: Sequence[float] = SHARES,
    half_life: int = Lrfu.HALF_LIFE,
) -> dict[str, list[float]]:
    """Hit rate of every policy at every budget, by the policy's name.

    Args:
        half_life: Of LRFU, in tokens, and of what foresight is added to.
    """
    policies: dict[str, Lru | None] = {f"window {k}": Window(k) for k in WINDOWS}
    policies |= {"lru": Lru(), "lrfu": Lrfu(half_life)}
    if trace.soon:
        policies["foresight"] = Foreseen(half_life)
    policies[OPTIMUM] = None
    budgets = [even_slots(trace, share) for share in shares]
    return {
        name: [hit_rate(replay(trace, policy, slots)) for slots in budgets]
        for name, policy in policies.items()
    }


def table(
    shares: Sequence[float],
    rates: dict[str, list[float]],
    divided: Sequence[tuple[float, int]],
) -> Table:
    """The same as a table, with what `curves.divided_rates` gives."""
    rows = []
    for i, share in enumerate(shares):
        cells = [f"{values[i]:.1%}" for values in rates.values()]
        rate, whole = divided[i]
        rows.append([f"{share:.0%}", *cells, f"{rate:.1%}", str(whole)])
    return Table(
        ["in memory", *rates, "divided by the trace", "whole layers"], rows, left=0
    )


def _engine(steps: list[Step], cache: SlotCache, soon: np.ndarray | None) -> list[int]:
    """Hits of each step, its reads done at once."""
    hits = []
    for i, step in enumerate(steps):
        hits.append(0)
        if soon is not None:
            cache.policy.expect(soon[i].astype(np.float32))
        for wave in cache.waves(*step):
            cache.arrived(wave.missing_slots)
            hits[-1] += len(wave.units) - len(wave.missing)
    return hits


def _optimum(steps: list[Step], units: int, n_slots: int) -> list[int]:
    """Hits of each step if what is wanted soonest is kept.

    A step's units must be together in memory, as for the engine. A step of more units
    than slots may keep any of what passed through, so that this stays a bound.
    """
    never = len(steps)
    following = np.full(units, never)
    next_use = []
    for i in range(len(steps) - 1, -1, -1):
        asked = steps[i][0]
        next_use.append(following[asked])
        following[asked] = i
    next_use.reverse()
    held = np.zeros(units, bool)
    soonest = np.full(units, never)  # next use of what is held
    hits = []
    for (asked, *_), then in zip(steps, next_use, strict=True):
        hits.append(int(held[asked].sum()))
        soonest[asked] = then
        forced = len(asked) <= n_slots
        held[asked] = not forced
        others = np.flatnonzero(held)
        room = n_slots - len(asked) if forced else n_slots
        if len(others) > room:
            keep = np.argpartition(soonest[others], room)[:room]
            held[others] = False
            held[others[keep]] = True
        if forced:
            held[asked] = True
    return hits
