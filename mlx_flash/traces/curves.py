"""Hits of each layer over its slots, counted on a trace, to divide memory by.

The engine's own cache and policy replay the trace at several numbers of slots.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..errors import FlashError
from ..memory.divide import Curve, Divide, divide
from ..memory.policies import Lru
from ..storage.manifest import Manifest
from .replay import even_slots, hit_rate, replay
from .trace import Trace, read_trace

# Most of a curve bends where little is in memory.
SHARES = (0.015, 0.03, 0.05, 0.08, 0.12, 0.17, 0.23, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)


def hit_curves(trace: Trace, policy: Lru) -> list[Curve]:
    """The curve of each layer, by replaying the trace at several budgets."""
    slots = [sorted({0, *(max(int(s * n), 1) for s in SHARES), n}) for n in trace.units]
    hits: list[list[int]] = [[0] for _ in trace.units]
    for i in range(1, max(len(sizes) for sizes in slots)):
        # Layers of fewer units have fewer sizes: their last one is counted again.
        now = [sizes[min(i, len(sizes) - 1)] for sizes in slots]
        for layer, (found, _) in enumerate(replay(trace, policy, now)):
            if i < len(slots[layer]):
                hits[layer].append(max(found, hits[layer][-1]))
    return [Curve(tuple(sizes), tuple(h)) for sizes, h in zip(slots, hits, strict=True)]


def rewarded_curves(
    trace: Trace, policy: Lru, reward_bytes: Sequence[float]
) -> list[Curve]:
    """Curves of the bytes that slots spare the trace, waits put in bytes, too.

    Args:
        reward_bytes: As `memory.whole.rewards` gives them for one token; without any,
            the curves count hits.
    """
    curves = hit_curves(trace, policy)
    if not any(reward_bytes):
        return curves
    steps = [len(n) - warm for n, warm in zip(trace.tokens, trace.warm, strict=True)]
    layers = zip(curves, trace.unit_bytes, reward_bytes, steps, strict=True)
    return [
        curve.scaled(unit_bytes).rewarded(reward * n)
        for curve, unit_bytes, reward, n in layers
    ]


def by_trace(
    path: Path, manifest: Manifest, policy: Lru, reward_bytes: Sequence[float]
) -> Divide:
    """`divide` by the curves of a trace file, for `make_budget`.

    Args:
        reward_bytes: As `rewarded_curves` takes them.

    Raises:
        FlashError: If the file is no trace, or of a model with other layers.
    """
    trace = read_trace(path)
    have = tuple(layer.units for layer in manifest.layers)
    if (trace.unit, trace.units) != (manifest.unit, have):
        raise FlashError(
            f"{path} is a trace of {trace.model} ({len(trace.units)} layers of "
            f"{trace.unit}s), not of this model ({len(have)} layers of "
            f"{manifest.unit}s). Record one of it: mlx-flash trace PROMPT -o FILE"
        )
    return partial(divide, rewarded_curves(trace, policy, reward_bytes))


def divided_rates(
    trace: Trace, policy: Lru, reward_bytes: Sequence[float], shares: Sequence[float]
) -> list[tuple[float, int]]:
    """(hit rate, layers held whole) of a trace whose own curves divide the slots.

    Args:
        reward_bytes: As `rewarded_curves` takes them.
        shares: Of all units, as much memory as each layer's share of them would take.
    """
    curves = rewarded_curves(trace, policy, reward_bytes)
    found = []
    for share in shares:
        even = even_slots(trace, share)
        room = sum(n * b for n, b in zip(even, trace.unit_bytes, strict=True))
        slots = divide(curves, trace.unit_bytes, room, [1] * len(even))
        whole = sum(n == m for n, m in zip(slots, trace.units, strict=True))
        found.append((hit_rate(replay(trace, policy, slots)), whole))
    return found
