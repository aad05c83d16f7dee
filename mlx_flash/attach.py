"""Give a model's modules the slots that their weights come into.

Layers that are held whole are read here, too.
"""

from .assembly import Assembled
from .flash import Flash
from .layers.lookup import Lookup
from .memory.budget import Budget
from .memory.policies import Lru
from .memory.slots import UnitSlots
from .progress import Bar


def loading_bar(parts: Assembled, budget: Budget, shown: bool | None) -> Bar:
    """For all bytes that loading reads."""
    manifest = parts.manifest
    slots = budget.slots + budget.beside_slots
    pairs = zip(slots, manifest.layers + manifest.beside, strict=True)
    whole = sum(entry.nbytes for n, entry in pairs if n == entry.units)
    total = manifest.resident.bytes + manifest.predictor_bytes + whole
    return Bar("loading", total, shown, unit="B", unit_scale=True)


def attach_slots(
    flash: Flash, parts: Assembled, policy: Lru, overlap: bool, bar: Bar
) -> list[UnitSlots]:
    """Give every layer its slots, and fill those of layers that are held whole."""
    attached = []
    for i, layer in enumerate(parts.layers):
        slots = UnitSlots(
            parts.manifest.layers[i],
            parts.extents[i],
            flash.budget.slots[i],
            policy,
            flash._reader,
            flash._fence,
            flash.stats,
            layer.apart if overlap else 0.0,
            parts.stored[i] if parts.stored else None,
        )
        layer.attach(slots, flash.budget.batch_tokens)
        if slots.n_slots == slots.units:
            slots.read_all()
            bar.advance(parts.manifest.layers[i].nbytes)
        attached.append(slots)
    return attached


def attach_beside(flash: Flash, parts: Assembled, bar: Bar) -> list[UnitSlots]:
    """The same for what is on flash beside these layers."""
    attached = []
    entries = zip(parts.manifest.beside, parts.beside, strict=True)
    for i, (entry, module) in enumerate(entries):
        slots = UnitSlots(
            entry,
            parts.beside_extents[i],
            flash.budget.beside_slots[i],
            Lru(),
            flash._reader,
            flash._fence,
            flash.stats,
            rows=isinstance(module, Lookup),
        )
        module.attach(slots, flash.budget.batch_tokens)
        if slots.n_slots == slots.units:
            slots.read_all()
            bar.advance(entry.nbytes)
        attached.append(slots)
    return attached
