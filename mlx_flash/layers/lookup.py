"""Tables of embeddings whose rows are on flash.

A token needs one row of such a table, known before anything is computed. All rows of a
call are read together, each once. mlx-lm's own module does the looking up, so that the
result is its result: it is given slots as its table, and slot numbers as ids.
Shapes: T ids, U different ones, D width of a row.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from ..errors import FlashError
from ..memory.slot_cache import Wave
from .base import FromFlash, NoSuchWeight, hide, join, with_children

TABLES = (nn.Embedding, nn.QuantizedEmbedding)
ROW_ARRAYS = frozenset(("weight", "scales", "biases"))
# Smaller tables stay resident: a lookup would wait for flash, to spare little memory.
LEAST_TABLE_BYTES = 64_000_000


def table_arrays(table: nn.Module) -> dict[str, mx.array]:
    """The arrays of a table by name, [rows, …] each: the parts of a row.

    {} if it has others, which would not be part of any row.
    """
    arrays = {key: x for key, x in table.items() if isinstance(x, mx.array)}
    return arrays if arrays.keys() <= ROW_ARRAYS else {}


def is_large(arrays: Iterable[mx.array]) -> bool:
    """Whether a table of these arrays is worth reading row by row."""
    return sum(array.nbytes for array in arrays) >= LEAST_TABLE_BYTES


def large_tables(model: nn.Module) -> dict[str, nn.Module]:
    """The large tables that a model only looks rows up in, by path."""
    found = {
        path: module
        for path, module in model.named_modules()
        if type(module) in TABLES and is_large(table_arrays(module).values())
    }
    return {path: table for path, table in found.items() if only_rows(model, path)}


class _RowsAlone(nn.Module):
    """A table that can do nothing but look rows up, and notes that it did."""

    def __init__(self, table: nn.Module):
        super().__init__()
        hide(self, "_table", table)
        self.used = False

    def __call__(self, ids: mx.array) -> mx.array:
        self.used = True
        return self._table(ids)


def only_rows(model: nn.Module, path: str) -> bool:
    """Whether a model runs with nothing of a table but some of its rows.

    Tied embeddings give the logits, too: for that all of the table is needed. The model
    is run without evaluating anything; its weights need not be loaded.
    """
    table = dict(model.named_modules())[path]
    with _exchanged(model, path, _RowsAlone(table)) as alone:
        try:
            model(mx.zeros((1, 2), mx.int32), cache=make_prompt_cache(model))
        except Exception:  # whatever a model makes of an attribute that is missing
            return False
    return alone.used


@contextmanager
def _exchanged(model: nn.Module, path: str, alone: _RowsAlone) -> Iterator[_RowsAlone]:
    model.update_modules(tree_unflatten([(path, alone)]))
    try:
        yield alone
    finally:
        model.update_modules(tree_unflatten([(path, alone._table)]))


class Lookup(NoSuchWeight, FromFlash):
    """An embedding that has its rows brought when their ids are known."""

    on_flash = ROW_ARRAYS

    def __init__(self, table: nn.Module):
        super().__init__()
        hide(self, "_table", with_children(table, dict.fromkeys(table_arrays(table))))

    def __call__(self, ids: mx.array) -> mx.array:
        """The rows [..., D] of ids [...].

        Raises:
            FlashError: If the table has no such row, or a read fails.
        """
        slots = self.slots
        if slots.holds_all:
            return self._in(slots.parts, ids)
        slots.wait_for(ids)
        wanted = self._known(np.asarray(ids).astype(np.intp))
        rows, places = np.unique(wanted, return_inverse=True)
        if not len(rows):
            return self._in(slots.parts, ids)
        brought: list[np.ndarray] = []

        def look_up(found: list[mx.array] | None, wave: Wave) -> list[mx.array]:
            if len(wave.units) == len(rows):
                return [self._in(slots.parts, mx.array(wave.slots_of(wanted)))]
            brought.append(wave.units)
            return [*(found or []), self._in(slots.parts, mx.array(wave.slots))]

        def finish(found: list[mx.array]) -> mx.array:
            y = join(found)
            if not brought:
                return y
            order = np.argsort(np.concatenate(brought))
            return y[mx.array(order[places.reshape(wanted.shape)])]

        return slots.run(rows, look_up, tokens=wanted.size, finish=finish)

    def _known(self, ids: np.ndarray) -> np.ndarray:
        """The rows that ids mean: negative ones count from the end, as for MLX."""
        units = self.slots.units
        if ids.size and not -units <= ids.min() <= ids.max() < units:
            raise FlashError(
                f"A table of {units:,} embeddings has no row {ids.min()} or "
                f"{ids.max()}. Give tokens of this model's vocabulary."
            )
        return np.where(ids < 0, ids + units, ids)

    def _in(self, arrays: dict[str, mx.array], rows: mx.array) -> mx.array:
        """What mlx-lm's own module finds in these rows of `arrays`."""
        return with_children(self._table, arrays)(rows)
