"""Slots for what is on flash beside the FFNs that a manifest's unit is about.

Of a mixture of experts these are dense FFNs, as blocks: every token needs all of them,
and of the experts a few. So blocks are held first, as far as memory goes, and experts
share the rest. Of a table of embeddings a token needs a row: tables are held last,
where all FFNs are held whole and memory is left, and have a few slots elsewhere.

Slots are those of `manifest.beside`: blocks come first, then tables.
"""

from collections.abc import Sequence

from ..storage.manifest import Layer, Manifest
from .allocation import spare_bytes

# Of a table that is not held whole. A longer chunk looks more rows up: it reads half as
# many at a time while it copies the others.
TABLE_SLOTS = 256


def least_beside(manifest: Manifest) -> tuple[int, ...]:
    """Slots where memory is short."""
    tables = (min(table.units, TABLE_SLOTS) for table in manifest.tables)
    return (1,) * len(manifest.blocks) + tuple(tables)


def bytes_beside(manifest: Manifest, slots: Sequence[int]) -> int:
    """What so many slots take, pages included."""
    return sum(
        n * part.bytes + spare_bytes(part.bytes)
        for n, entry in zip(slots, manifest.beside, strict=True)
        for part in entry.parts
    )


def more_beside(manifest: Manifest, slots: Sequence[int] | None = None) -> int:
    """What so many slots, or those of all units, take beyond the least ones."""
    if slots is None:
        slots = [entry.units for entry in manifest.beside]
    least = least_beside(manifest)
    return bytes_beside(manifest, slots) - bytes_beside(manifest, least)


def blocks_first(manifest: Manifest, room: float) -> tuple[int, ...]:
    """Slots where `room` bytes are left beside the least ones of everything.

    The first blocks have as many as they can use; tables have their least.
    """
    slots = list(least_beside(manifest))
    for i, entry in enumerate(manifest.blocks):
        size = _slot_bytes(entry)
        more = min(entry.units - slots[i], int(max(room, 0) // size))
        slots[i] += more
        room -= more * size
    return tuple(slots)


def tables_last(
    manifest: Manifest, slots: Sequence[int], room: float
) -> tuple[int, ...]:
    """The same slots, with tables held whole as far as `room` bytes go."""
    given = list(slots)
    for i, entry in enumerate(manifest.tables, start=len(manifest.blocks)):
        more = (entry.units - given[i]) * _slot_bytes(entry)
        if more <= room:
            given[i] = entry.units
            room -= more
    return tuple(given)


def _slot_bytes(entry: Layer) -> int:
    return sum(part.bytes for part in entry.parts)
