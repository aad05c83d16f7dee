"""Whether reads of units go through the operating system's page cache, or around it.

Through it, what was read stays in memory beyond the budget as long as nobody wants that
for something else, and reading it again is a copy. Where little of what is read again
and again fits there, a read costs that copy and seldom saves one from flash. What
`mlx-flash probe` measured of this machine comes first.
"""

import math
from collections.abc import Sequence

import mlx.core as mx

from ..errors import FlashError
from ..profile import Profile, measured_here
from ..storage.manifest import Layer
from . import pressure

SETTINGS = ("auto", "on", "off")
CLEARLY = 1.1  # times as fast, before one of two measurements counts as faster
KEPT_BACK = 0.1  # of the memory that is free: other programs will want some of it


def use_page_cache(
    setting: bool | str,
    layers: Sequence[Layer],
    slots: Sequence[int],
    budget_bytes: int,
    worthwhile: float,
) -> bool:
    """Decide for a model that is about to be loaded.

    Args:
        setting: "on" or True, "off" or False; "auto" is what this machine's profile
            says, where that leaves no doubt. Else it is on where the memory that the
            machine has free beyond the budget can hold enough.
        layers: Of the model.
        slots: The number of slots of each layer.
        budget_bytes: All that the model will take by itself.
        worthwhile: Enough: this share of the layers that slots do not hold whole. What
            the slots hold of these counts, too: units take turns in them, and all go
            through the page cache in the end.

    Raises:
        FlashError: If there is no such setting.
    """
    if isinstance(setting, bool):
        return setting
    if setting not in SETTINGS:
        raise FlashError(f"page_cache is {setting!r}. Try auto, on or off.")
    if setting != "auto":
        return setting == "on"
    streamed = sum(
        layer.units * layer.unit_bytes
        for layer, n in zip(layers, slots, strict=True)
        if n < layer.units
    )
    if not streamed:
        return False
    profile = measured_here(mx.default_device().type.name)
    if profile is not None:
        known = better_through(profile, max(layer.unit_bytes for layer in layers))
        if known is not None:
            return known
    free = (1 - KEPT_BACK) * pressure.available_bytes()
    return free - budget_bytes >= worthwhile * streamed


def better_through(profile: Profile, read_bytes: int) -> bool | None:
    """Whether reads of this length are faster through the page cache, come what may.

    Returns:
        True if they are also where it has nothing of what is read, False if they are
        not even where it has all of it, None if it depends on what it has, or if
        nothing was measured.
    """
    if not profile.buffered:
        return None
    point = min(
        profile.buffered, key=lambda x: abs(math.log(x.block_bytes / read_bytes))
    )
    direct = profile.read_bytes_per_s(point.block_bytes, point.threads)
    if point.warm_bytes_per_s <= direct:
        return False
    return True if point.cold_bytes_per_s >= CLEARLY * direct else None
