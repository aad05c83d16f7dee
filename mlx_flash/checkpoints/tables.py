"""Find large tables of embeddings in a stock checkpoint, where they can stay.

mlx-lm keeps most tables as the files have them, so a row is a run of bytes for each of
its parts. A table that was made out of several tensors, or cast, stays resident.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.nn as nn

from ..layers.lookup import large_tables, table_arrays
from ..storage.extents import Extent, Region
from ..storage.layout import lay_out
from ..storage.manifest import Layer, Manifest, version_of
from ..storage.safetensors import DTYPES
from .stock import Stock
from .weight_format import layer_of


def tables_in_place(
    stock: Stock, manifest: Manifest
) -> tuple[Manifest, list[list[Region]]]:
    """A checkpoint's manifest with its large tables, and where the rows of each lie.

    Args:
        manifest: With all tables resident.
    """
    tables, extents = [], []
    for path, table in large_tables(stock.model).items():
        if (places := _extents(stock, table)) is not None:
            file = places[0].path.name
            tables.append(layer_of(path, table_arrays(table), file))
            extents.append(places)
    return with_tables(manifest, tables), extents


def with_tables(manifest: Manifest, tables: Sequence[Layer]) -> Manifest:
    """The manifest of a model of which these tables are on flash, not resident."""
    nbytes = manifest.resident.bytes - sum(table.nbytes for table in tables)
    return replace(
        manifest,
        format_version=version_of(manifest.share, tables),
        resident=replace(manifest.resident, bytes=nbytes),
        tables=tuple(tables),
    )


def _extents(stock: Stock, table: nn.Module) -> list[Region] | None:
    """Where the parts of a table's rows lie; None if not as mlx-lm uses them."""
    extents: list[Region] = []
    arrays = table_arrays(table)
    parts = lay_out(arrays)
    for index, (part, array) in enumerate(zip(parts, arrays.values(), strict=True)):
        tensor = stock.tensor(array)
        if tensor is None or part.dtype not in DTYPES:
            return None
        place = stock.places[tensor]
        if place.bytes != array.nbytes:
            return None
        whole = ((index, 0, part.bytes),)
        extents.append(Extent(place.file, place.offset, part.bytes, whole))
    return extents
