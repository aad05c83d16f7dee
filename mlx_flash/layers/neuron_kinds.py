"""Neurons as units, with all of their rows on flash or with their gates in memory.

Shapes: n units of a layer, D model width.
"""

import mlx.core as mx
import mlx.nn as nn

from ..storage.manifest import Layer
from .base import Guess
from .gated import GatedFFN, without_gate
from .neuron import NeuronFFN
from .predictor import Predictor
from .projections import (
    by_neuron,
    count_neurons,
    known_projections,
    neuron_parts,
    pack,
    packing,
    projections,
)
from .unit_kind import UnitKind

# The least that a layer of neurons works with is one slot for so many of them.
NEURONS_PER_SLOT = 64


class Neurons(UnitKind):
    """An FFN with exact zeros; a unit is the rows of one neuron."""

    name = "neuron"
    # On the demo model it hits 3 to 5 points more than LRU does.
    policy = "lrfu"
    same_dtypes = True
    gathered = 0.5

    def split(self, module: nn.Module) -> dict[str, mx.array]:
        return neuron_parts(module)

    def parts(
        self, module: nn.Module, units: int, dtype: mx.Dtype
    ) -> dict[str, mx.array]:
        """Bundles may be packed along D, where the module's own weights are not."""
        if (names := projections(module)) is None:
            return {}
        ins, out = names
        if units != count_neurons(module[out]):
            return {}
        # Nothing evaluates these: it is their shapes that are asked for.
        dims = len(module[out].weight)
        rows = {out: mx.zeros((units, dims), dtype)}
        for name in ins:
            whole = mx.zeros((len(module[name].weight), dims), dtype)
            rows[name] = by_neuron(module, name, whole)
        return {
            f"{name}.{key}": array
            for name in (*ins, out)
            for key, array in pack(rows[name], packing(module[name])).items()
        }

    def make(self, module: nn.Module, layer: Layer, predictor: bool) -> NeuronFFN:
        if layer.predictor is None or not predictor:
            return NeuronFFN(module)
        dims = len(module[known_projections(module)[1]].weight)
        facts = layer.predictor
        return NeuronFFN(module, Predictor(dims, layer.units, facts.rank, facts.bits))

    def guess_of(self, layer, block, following) -> Guess | None:
        if "predictor" not in following:
            return None
        return lambda x, _: following.predictor(x)

    def least_slots(self, units: int) -> int:
        return max(units // NEURONS_PER_SLOT, 1)

    def hidden_bytes(self, layers, value_bytes, experts_per_token, share) -> int:
        # Hidden values, then a predictor's scores and masks.
        per_unit = share * 4 * value_bytes + 4 + 3
        return int(max(layer.units for layer in layers) * per_unit)

    def asked(self, layer, experts_per_token, predicted) -> float | None:
        return None if predicted is None else predicted * layer.units


class GatedNeurons(Neurons):
    """An FFN whose gates stay in memory; a unit is what else belongs to a neuron."""

    name = "gated neuron"

    def arrays(self, module: nn.Module) -> dict[str, mx.array]:
        return without_gate(module, super().arrays(module))

    def split(self, module: nn.Module) -> dict[str, mx.array]:
        return without_gate(module, super().split(module))

    def parts(
        self, module: nn.Module, units: int, dtype: mx.Dtype
    ) -> dict[str, mx.array]:
        return without_gate(module, super().parts(module, units, dtype))

    def make(self, module: nn.Module, layer: Layer, predictor: bool) -> NeuronFFN:
        return GatedFFN(module)

    def hidden_bytes(self, layers, value_bytes, experts_per_token, share) -> int:
        made = 3 * self.token_bytes(layers, value_bytes, None)  # of gates, to compare
        return made + super().hidden_bytes(layers, value_bytes, 0, share)

    def token_bytes(self, layers, value_bytes, shapes) -> int:
        return max(layer.units for layer in layers) * value_bytes  # its gates
