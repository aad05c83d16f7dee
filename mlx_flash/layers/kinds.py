"""What differs between neurons, experts and blocks, each in one class.

Everything else in mlx-flash asks the kind instead of comparing names.
Shapes: n units of a layer, D model width.
"""

from collections.abc import Mapping, Sequence
from math import prod

import mlx.core as mx
import mlx.nn as nn

from ..memory.footprint import Shapes
from ..memory.policies import Lrfu
from ..storage.manifest import Layer, Manifest
from ..storage.safetensors import DTYPES
from .base import FlashFFN, Guess
from .block import BlockFFN, block_parts, cut_blocks, ffn_arrays
from .dense import dense_ffns
from .expert import ExpertFFN, switch_layers, switch_parts
from .gated import GatedFFN, without_gate
from .lookahead import router_guess
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

# The least that a layer of neurons works with is one slot for so many of them.
NEURONS_PER_SLOT = 64


class UnitKind:
    """A kind of unit: where it is found, what it holds, what it needs in memory.

    Attributes:
        name: As the manifest and the figures call it.
        policy: What stays in memory unless somebody chooses: "lru" or "lrfu".
        half_life: Tokens in which LRFU forgets half of a use.
        activation: What the manifest says of the non-linearity where nothing is known.
        same_dtypes: Whether bundles have the model's dtype, whatever they came from.
        gathered: The largest share of a layer's slots that a step may copy, to have
            the rows it wants side by side.
        worth_caching: Reads go through the page cache where it can hold this share of
            the layers that are not held whole: measured, see docs/experiments.md.
    """

    name: str
    policy = "lru"
    half_life = Lrfu.HALF_LIFE
    activation = "module"
    same_dtypes = False
    gathered = 0.0
    worth_caching = 0.5

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        """The FFN modules that can go to flash, by path, in the order of the layers."""
        return dense_ffns(model)

    def arrays(self, module: nn.Module) -> dict[str, mx.array]:
        """A module's own arrays that go to flash, by their names inside of it."""
        return ffn_arrays(module)

    def split(self, module: nn.Module) -> dict[str, mx.array]:
        """The same arrays cut into units, [n, …] each: the parts of a bundle."""
        raise NotImplementedError

    def parts(
        self, module: nn.Module, units: int, dtype: mx.Dtype
    ) -> dict[str, mx.array]:
        """Lazy arrays [units, …] like the parts that a manifest must describe.

        {} if the module cannot be cut into so many units. `dtype` is the model's.
        """
        raise NotImplementedError

    def make(self, module: nn.Module, layer: Layer, predictor: bool) -> FlashFFN:
        """The module that takes the place of a model's own.

        Args:
            layer: Of the manifest.
            predictor: Whether to use the layer's predictor if it has one.

        Raises:
            ValueError: If the layer's predictor is impossible.
        """
        raise NotImplementedError

    def guess_of(
        self, layer: FlashFFN, block: nn.Module, following: FlashFFN
    ) -> Guess | None:
        """How `layer` can guess what `following` will need, None if it cannot.

        Args:
            block: The module that `following` lies in.
        """
        return None

    def least_slots(self, units: int) -> int:
        """The fewest slots that a layer of so many units works with."""
        return 1

    def hidden_bytes(
        self,
        layers: Sequence[Layer],
        value_bytes: int,
        experts_per_token: int,
        share: float,
    ) -> int:
        """What the hidden values of one token take while its widest FFN is computed.

        Args:
            layers: Of the manifest.
            value_bytes: Of an activation.
            experts_per_token: Of a mixture of experts.
            share: Of a layer's units, the most that are multiplied at once.
        """
        raise NotImplementedError

    def token_bytes(
        self, layers: Sequence[Layer], value_bytes: int, shapes: Shapes
    ) -> int:
        """What is kept of every token of a prompt chunk until an FFN is through.

        Besides vectors of the model's width, which every kind has.
        """
        return 0

    def asked(
        self, layer: Layer, experts_per_token: int, predicted: float | None
    ) -> float | None:
        """How many units of a layer one token asks for; None for all, in order.

        Args:
            predicted: The share of neurons that a predictor names, None without one.
        """
        return None


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


class Experts(UnitKind):
    """A mixture of experts; a unit is all projections of one of them."""

    name = "expert"
    # On the demo mixture it hits 4 to 7 points more than LRU does, with 64 tokens a
    # point more than with 16.
    policy = "lrfu"
    half_life = 64
    activation = "switch"

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        return switch_layers(model)

    def arrays(self, module: nn.Module) -> dict[str, mx.array]:
        return switch_parts(module)

    def split(self, module: nn.Module) -> dict[str, mx.array]:
        return switch_parts(module)

    def parts(
        self, module: nn.Module, units: int, dtype: mx.Dtype
    ) -> dict[str, mx.array]:
        parts = switch_parts(module)
        return parts if all(len(a) == units for a in parts.values()) else {}

    def make(self, module: nn.Module, layer: Layer, predictor: bool) -> ExpertFFN:
        return ExpertFFN(module)

    def guess_of(self, layer, block, following) -> Guess | None:
        return router_guess(block, following.experts, layer.dims)

    def hidden_bytes(self, layers, value_bytes, experts_per_token, share) -> int:
        rows = max(p.shape[0] for x in layers for p in x.parts if p.shape)
        return experts_per_token * rows * 5 * value_bytes

    def token_bytes(self, layers, value_bytes, shapes) -> int:
        # The output of every expert, put together and in order; the router's scores.
        outputs = 3 * shapes.experts_per_token * shapes.width * value_bytes
        return outputs + 12 * max(layer.units for layer in layers)

    def asked(self, layer, experts_per_token, predicted) -> float | None:
        return float(min(experts_per_token, layer.units))


class Blocks(UnitKind):
    """Any other dense FFN; a unit is a run of its neurons, and all are needed."""

    name = "block"
    worth_caching = 1.0  # all are read in turn: what does not fit pushes all else out

    def split(self, module: nn.Module) -> dict[str, mx.array]:
        return block_parts(module)

    def parts(
        self, module: nn.Module, units: int, dtype: mx.Dtype
    ) -> dict[str, mx.array]:
        if projections(module) is None:
            return {}
        try:
            return cut_blocks(module, units)
        except ValueError:  # neurons that are no whole blocks
            return {}

    def make(self, module: nn.Module, layer: Layer, predictor: bool) -> BlockFFN:
        return BlockFFN(module)

    def hidden_bytes(self, layers, value_bytes, experts_per_token, share) -> int:
        rows = max(x.units * prod(x.parts[0].shape[:-1]) for x in layers)
        return int(rows * 4 * value_bytes * share) + 1


NEURON, GATED, EXPERT, BLOCK = Neurons(), GatedNeurons(), Experts(), Blocks()
KINDS: Mapping[str, UnitKind] = {x.name: x for x in (NEURON, GATED, EXPERT, BLOCK)}


def kind_of(manifest: Manifest) -> UnitKind:
    """The kind of a manifest's units."""
    return KINDS[manifest.unit]


def value_bytes(manifest: Manifest) -> int:
    """Bytes of one activation of a model."""
    return DTYPES[manifest.dtype][1]
