"""The memory of one layer's slots, and what lies in it.

Each part of a unit has one MLX array `[n_slots, *shape]`. NumPy views of the same
memory are what the reader writes to, so nothing is staged or copied.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..storage.manifest import Layer
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
    parts, views = {}, []
    for part in layer.parts:
        shape = len(cache.unit_of), *part.shape
        parts[part.name], view = allocate(shape, getattr(mx, part.dtype))
        views.append(view)
    return Held(cache, parts, views)
