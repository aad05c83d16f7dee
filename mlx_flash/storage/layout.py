"""How the parts of a unit lie side by side in its bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .manifest import Part

if TYPE_CHECKING:
    import mlx.core as mx


def dtype_name(dtype: mx.Dtype) -> str:
    """A dtype as the manifest spells it: "float32" for `mx.float32`."""
    return str(dtype).rpartition(".")[2]


def lay_out(arrays: Mapping[str, mx.array]) -> tuple[Part, ...]:
    """The parts of a unit, one after the other, in the order of `arrays`.

    Args:
        arrays: Each part of all units by name, [units, …]; only sizes are looked at.
    """
    parts, offset = [], 0
    for name, array in arrays.items():
        nbytes = array.nbytes // len(array)
        shape = tuple(array.shape[1:])
        parts.append(Part(name, dtype_name(array.dtype), shape, offset, nbytes))
        offset += nbytes
    return tuple(parts)
