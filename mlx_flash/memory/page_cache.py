"""Whether reads of units go through the operating system's page cache, or around it.

Through it, what was read stays in memory beyond the budget as long as nobody wants that
for something else, and reading it again is a copy. Where little of what is read again
and again fits there, a read costs that copy and seldom saves one from flash.
"""

from collections.abc import Sequence

from ..errors import FlashError
from ..storage.manifest import Layer
from . import pressure

SETTINGS = ("auto", "on", "off")
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
        setting: "on" or True, "off" or False; "auto" is on where the memory that the
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
    free = (1 - KEPT_BACK) * pressure.available_bytes()
    return streamed > 0 and free - budget_bytes >= worthwhile * streamed
