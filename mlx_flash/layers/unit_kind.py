"""What a kind of unit answers; `kinds.py` has those that there are.

Shapes: n units of a layer.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ..memory.footprint import Shapes
from ..memory.policies import Lrfu
from ..storage.manifest import Layer
from .base import FlashFFN, Guess
from .block import ffn_arrays
from .dense import dense_ffns


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
