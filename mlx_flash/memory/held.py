"""The memory of one layer's slots, and what lies in it.

Each part of a unit has one MLX array `[n_slots, *shape]`. NumPy views of the same
memory are what the reader writes to, so nothing is staged or copied.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..storage.manifest import Layer, Part
from .allocation import allocate
from .slot_cache import SlotCache


@dataclass(frozen=True)
class Held:
    """So many slots. Another number of slots is another one of these.

    Attributes:
        cache: Which unit is in which slot.
        parts: The MLX array of each part, by name, `[n_slots, *shape]`.
        views: The same memory for NumPy, uint8 `[n_slots, bytes]`, part by part.
        whole: Whether unit i is in slot i for every unit, for good.
    """

    cache: SlotCache
    parts: dict[str, mx.array]
    views: list[np.ndarray]
    whole: bool = False

    def clear(self, slots: np.ndarray) -> None:
        """Zero slots that hold no unit: parts of one might be infinite or no number.

        A layer may multiply all slots and drop what it did not want, and 0 times NaN
        is NaN.
        """
        for view in self.views:
            view[slots] = 0


def allocate_held(layer: Layer, cache: SlotCache) -> Held:
    """Memory for as many slots as `cache` has, all zeros."""
    held = Held(cache, {}, [])
    for part in layer.parts:
        _add_part(held, part)
    return held


def move_held(
    layer: Layer, old: Held, rows: np.ndarray, cache: SlotCache, kept: np.ndarray
) -> Held:
    """Memory for `cache`, with the `rows` of `old` in its slots `kept`.

    Part by part, and what `old` had of a part goes first: `old` is of no use any more.
    """
    held = Held(cache, {}, [])
    for i, part in enumerate(layer.parts):
        staged = old.views[i][rows]
        old.views[i] = staged
        del old.parts[part.name]
        mx.clear_cache()
        _add_part(held, part)[kept] = staged
    return held


def resized_held(
    layer: Layer, old: Held, n_slots: int, spare_bytes: int
) -> Iterator[Held]:
    """Another number of slots, with as many units as fit into `spare_bytes`.

    First comes one empty slot, to be used if whatever follows is stopped: it is little,
    but not wrong. `old` is of no use once the second one was asked for.
    """
    largest = max(part.bytes for part in layer.parts)
    cache, rows, kept = old.cache.resized(n_slots, spare_bytes // largest)
    yield allocate_held(layer, old.cache.resized(1, 0)[0])
    yield move_held(layer, old, rows, cache, kept)


def _add_part(held: Held, part: Part) -> np.ndarray:
    shape = len(held.cache.unit_of), *part.shape
    array, view = allocate(shape, getattr(mx, part.dtype))
    held.parts[part.name] = array
    held.views.append(view)
    return view
