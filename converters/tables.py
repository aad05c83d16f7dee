"""Put large tables of embeddings on flash: a bundle for each row.

Whatever kind the FFNs' units are, a table that is only looked up need not stay in
memory. A row's bundle has what the table's module has of it: weights, or packed
weights with their scales and biases.
"""

from pathlib import Path

import mlx.core as mx

from ..layers.lookup import ROW_ARRAYS, TABLES, is_large, only_rows
from ..storage.manifest import Layer
from .arrays import finite
from .bundles import write_bundles
from .source import Source


def take_tables(
    source: Source, arrays: dict[str, mx.array]
) -> dict[str, dict[str, mx.array]]:
    """Take the large tables that a model only looks up out of its resident weights.

    Args:
        arrays: All weights in no bundle, by name.

    Returns:
        The parts of each table, [rows, …], by its path in the model.
    """
    model = source.make_model()
    tables = {}
    for path, module in model.named_modules():
        if type(module) not in TABLES:
            continue
        start = f"{path}."
        names = [name for name in arrays if name.startswith(start)]
        known = ROW_ARRAYS.issuperset(name.removeprefix(start) for name in names)
        large = is_large(arrays[name] for name in names)
        if known and large and only_rows(model, path):
            tables[path] = {x.removeprefix(start): arrays.pop(x) for x in names}
    return tables


def write_tables(
    folder: Path, tables: dict[str, dict[str, mx.array]]
) -> tuple[Layer, ...]:
    """Write the file of each table, and describe it.

    `tables` is emptied on the way: one of them is in memory at a time.
    """
    entries: list[Layer] = []
    for path in list(tables):
        parts = tables.pop(path)
        for name, array in parts.items():
            finite(f"{path}.{name}", array)
        file = folder / f"ffn/table_{len(entries):02d}.safetensors"
        entries.append(write_bundles(file, path, parts))
    return tuple(entries)
