"""Slots for tables of embeddings, of which a token needs one row each.

A slot of an FFN saves far more reading than one of a table. So tables are held whole
where all FFNs are and memory is left, and have a few slots elsewhere.
"""

from collections.abc import Sequence

from ..storage.manifest import Layer
from .allocation import spare_bytes

# Of a table that is not held whole. A longer chunk looks more rows up: it reads half as
# many at a time while it copies the others.
TABLE_SLOTS = 256


def least_table_slots(tables: Sequence[Layer]) -> tuple[int, ...]:
    """Slots of each table where memory is short."""
    return tuple(min(table.units, TABLE_SLOTS) for table in tables)


def bytes_of_tables(tables: Sequence[Layer], slots: Sequence[int]) -> int:
    """What so many slots of each table take, pages included."""
    return sum(
        n * part.bytes + spare_bytes(part.bytes)
        for n, table in zip(slots, tables, strict=True)
        for part in table.parts
    )


def more_bytes(tables: Sequence[Layer], slots: Sequence[int] | None = None) -> int:
    """What so many slots of each table, or all, take beyond the least ones."""
    if slots is None:
        slots = [table.units for table in tables]
    least = least_table_slots(tables)
    return bytes_of_tables(tables, slots) - bytes_of_tables(tables, least)


def table_slots(tables: Sequence[Layer], room: float) -> tuple[int, ...]:
    """Slots of each table where `room` bytes are left beside the least ones.

    As many tables as fit are held whole.
    """
    slots = list(least_table_slots(tables))
    for i, table in enumerate(tables):
        more = (table.units - slots[i]) * sum(part.bytes for part in table.parts)
        if more <= room:
            slots[i] = table.units
            room -= more
    return tuple(slots)
