"""How the projections of neurons are packed in bundles, and of which arrays.

What mlx-lm quantised has its ways into the neurons packed along the model's width, as
bundles have them: their arrays are taken bit for bit. The way out is packed across
neurons there, and is unpacked and packed anew.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..layers.projections import (
    PACKED,
    by_neuron,
    known_projections,
    neuron_rows,
    pack,
    unpack,
)
from .options import ConvertOptions
from .source import Source

Packing = dict[str, Any] | None


class Packings:
    """Whether bundles keep a checkpoint's packing, or have another.

    Attributes:
        own: Whether they keep it: nobody asked for bits or for a dtype.
    """

    def __init__(self, source: Source, options: ConvertOptions):
        self._source = source
        self._asked = options.packing
        plain = options.packing is None and options.dtype is None
        self.own = bool(source.packing) and plain

    def of(self, ffn: str, name: str) -> Packing:
        """How the projection `name` of the FFN at a path is packed; None for floats."""
        if self.own:
            return self._source.packing.get(f"{ffn}.{name}")
        return self._asked

    def parts(
        self, path: str, ffn: nn.Module, dtype: mx.Dtype, order: mx.array | None
    ) -> dict[str, mx.array]:
        """The parts of an FFN's neurons, [N, …] each.

        Args:
            path: Of the FFN.
            ffn: With its weights in floats.
            dtype: Of what stays float.
            order: Which neuron comes where; None for the checkpoint's order.
        """
        ins, _ = known_projections(ffn)
        rows = slice(None) if order is None else order
        parts: dict[str, mx.array] = {}
        for name, weight in neuron_rows(ffn).items():
            if self.own and name in ins and self.of(path, name):
                arrays = self._stored(f"{path}.{name}", dtype)
                cut = {k: by_neuron(ffn, name, a)[rows] for k, a in arrays.items()}
            else:
                cut = pack(weight[rows], self.of(path, name))
            parts |= {f"{name}.{key}": array for key, array in cut.items()}
        return parts

    def unpacked(self, path: str, ffn: nn.Module) -> dict[str, mx.array]:
        """The rows of each projection as `neuron_rows` has them, as packing left them.

        Args:
            path: Of the FFN.
            ffn: With its weights in floats.
        """
        ins, _ = known_projections(ffn)
        found = neuron_rows(ffn)
        for name, rows in found.items():
            how = self.of(path, name)
            if how is not None and not (self.own and name in ins):
                found[name] = unpack(pack(rows, how), how)
        return found

    def _stored(self, path: str, dtype: mx.Dtype) -> dict[str, mx.array]:
        """The arrays of a quantised module, those of floats in `dtype`."""
        stored = self._source.stored()
        found = {k: stored[f"{path}.{k}"] for k in PACKED if f"{path}.{k}" in stored}
        return {
            key: array.astype(dtype)
            if mx.issubdtype(array.dtype, mx.floating)
            else array
            for key, array in found.items()
        }
