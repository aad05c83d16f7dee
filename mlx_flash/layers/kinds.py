"""What differs between neurons, experts and blocks, each in one class.

Everything else in mlx-flash asks the kind instead of comparing names.
Shapes: n units of a layer.
"""

from collections.abc import Mapping
from math import prod

import mlx.core as mx
import mlx.nn as nn

from ..storage.manifest import Layer, Manifest
from ..storage.safetensors import DTYPES
from .base import Guess
from .block import BlockFFN, block_parts, cut_blocks
from .expert import ExpertFFN, switch_layers, switch_parts
from .lookahead import router_guess
from .neuron_kinds import GatedNeurons, Neurons
from .projections import projections
from .unit_kind import UnitKind


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
