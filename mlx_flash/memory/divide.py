"""Divide a budget of slots over layers by what they save, on a recorded trace.

A slot gains more in a layer whose units repeat than in one whose units do not. How
much, say the layer's hits at several numbers of slots, counted by the engine's own
cache and policy. The concave hulls of these curves are climbed together, the steepest
piece first: the most hits for the memory, as far as the trace tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..errors import FlashError
from ..storage.manifest import Manifest
from ..traces.recording import Trace, read_trace
from ..traces.replay import replay
from .policies import Lru

# Most of a curve bends where little is in memory.
SHARES = (0.015, 0.03, 0.05, 0.08, 0.12, 0.17, 0.23, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)


@dataclass(frozen=True)
class Curve:
    """Hits of one layer at rising numbers of slots, the first and the last certain."""

    slots: tuple[int, ...]
    hits: tuple[float, ...]

    def hull(self) -> list[tuple[float, int, int]]:
        """(hits gained by each slot, from slots, to slots), falling in gain."""
        hull: list[tuple[int, float]] = []
        for x, y in zip(self.slots, self.hits, strict=True):
            while len(hull) > 1:
                (x0, y0), (x1, y1) = hull[-2:]
                if (y1 - y0) * (x - x1) > (y - y1) * (x1 - x0):
                    break
                hull.pop()
            hull.append((x, y))
        ends = zip(hull[:-1], hull[1:], strict=True)
        return [((b[1] - a[1]) / (b[0] - a[0]), a[0], b[0]) for a, b in ends]


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


def by_trace(path: Path, manifest: Manifest, policy: Lru) -> partial:
    """`divide` by the curves of a trace file, for `make_budget`.

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
    return partial(divide, hit_curves(trace, policy))


def divide(
    curves: Sequence[Curve],
    unit_bytes: Sequence[int],
    room_bytes: float,
    least: Sequence[int],
) -> tuple[int, ...]:
    """Slots of each layer that together take at most `room_bytes`.

    Args:
        curves: From `hit_curves`.
        unit_bytes: What a slot of each layer takes.
        room_bytes: For all slots. The least are given even if they take more.
        least: Slots that a layer gets whatever it gains.
    """
    slots = list(least)
    room = room_bytes - sum(n * b for n, b in zip(slots, unit_bytes, strict=True))
    pieces = [
        (-gain / unit_bytes[layer], layer, stop)
        for layer, curve in enumerate(curves)
        for gain, _, stop in curve.hull()
    ]
    # A hull falls in gain, so a layer's pieces come in the order of its slots.
    for _, layer, stop in sorted(pieces):
        fitting = int(max(room, 0) // unit_bytes[layer])
        given = min(max(stop - slots[layer], 0), fitting)
        slots[layer] += given
        room -= given * unit_bytes[layer]
    return tuple(slots)
