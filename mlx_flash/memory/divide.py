"""Divide a budget of slots over layers by what more slots would save.

A slot gains more in a layer whose units repeat than in one whose units do not. A curve
gives a layer's hits at several numbers of slots (`traces.curves` counts them). The
concave hulls of the curves are climbed together, the steepest piece first: that gives
the most hits for the memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

# (bytes of a slot of each layer, room for all slots, the least slots) → slots of each
# layer, None where equal shares are as good
Divide = Callable[[Sequence[int], float, Sequence[int]], tuple[int, ...] | None]


@dataclass(frozen=True)
class Curve:
    """Hits of one layer at rising numbers of slots, the first and the last certain.

    Or anything else that slots are worth, the same for all layers.
    """

    slots: tuple[int, ...]
    hits: tuple[float, ...]

    def scaled(self, factor: float) -> "Curve":
        """The curve with every hit worth `factor`."""
        return replace(self, hits=tuple(factor * h for h in self.hits))

    def rewarded(self, reward: float) -> "Curve":
        """The curve with something more for holding all units.

        Its hull ends in a straight piece, from where it pays to go on to the end.
        """
        return replace(self, hits=(*self.hits[:-1], self.hits[-1] + reward))

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


def divide(
    curves: Sequence[Curve],
    unit_bytes: Sequence[int],
    room_bytes: float,
    least: Sequence[int],
) -> tuple[int, ...]:
    """Slots of each layer that together take at most `room_bytes`.

    Args:
        curves: Of each layer, from `traces.curves.hit_curves`.
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
