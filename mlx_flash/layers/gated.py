"""FFNs whose gates stay in memory: they say which neurons a token needs.

A neuron's hidden value is act(g) · u. Its gate g comes from resident rows, so nothing
has to be predicted: where |act(g)| times what u mostly is (its gain) is no larger than
a threshold, the neuron is left out, and its up row and down column need not be read.
(CATS, arXiv 2404.08763, which knows no gains: see docs/experiments.md.) Without a
threshold every neuron is computed.
Shapes: T tokens, D model width, N neurons.
"""

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from .dense import hidden_of
from .neuron import NeuronFFN
from .projections import projections
from .slot_ffn import Arrays


class GatedFFN(NeuronFFN):
    """An FFN over neurons whose gates are known before anything is read.

    What a token skips depends on the token alone: not on memory, on how its prompt is
    cut, or on whether the layer is held whole.

    Attributes:
        gains: [N], by which gates' activations are compared.
        threshold: Up to which a neuron is skipped, None to skip none.
    """

    threshold: float | None = None

    def __init__(self, ffn: nn.Module):
        super().__init__(ffn)
        self._gate, self._up, self._out = self._names
        self[self._gate] = ffn[self._gate]
        self.gains = mx.ones((self.neurons,))

    @property
    def sparse(self) -> bool:
        return self.threshold is not None

    def known(self, x: mx.array) -> Arrays:
        """The gates [T, N], 0 where a neuron is skipped: then it adds nothing."""
        gates = self[self._gate](x)
        if self.threshold is not None:
            names = self._gate, self._up, self._out
            gates = loud(self._ffn, names, gates, self.gains, self.threshold)
        return {self._gate: gates}

    def chosen(self, x: mx.array, known: Arrays) -> mx.array:
        return known[self._gate] != 0


def activations(
    ffn: nn.Module, names: tuple[str, str, str], gates: mx.array
) -> mx.array:
    """act(g) of gates [T, N].

    Args:
        ffn: The model's own module, of whose projections nothing is asked.
        names: Of its gate, its up and its down projection.
    """
    gate, up, out = names
    return hidden_of(ffn, {gate: gates, up: mx.ones_like(gates)}, out)


def loud(
    ffn: nn.Module,
    names: tuple[str, str, str],
    gates: mx.array,
    gains: mx.array,
    threshold: float,
) -> mx.array:
    """The gates, 0 where their activation times a gain is at most `threshold`."""
    said = mx.abs(activations(ffn, names, gates)) * gains
    return mx.where(said > threshold, gates, 0)


def without_gate(
    module: nn.Module, arrays: Mapping[str, mx.array]
) -> dict[str, mx.array]:
    """All but the arrays of the first of two ways in; {} where there are no two."""
    names = projections(module)
    if names is None or len(names[0]) < 2:
        return {}
    gate = names[0][0]
    return {k: a for k, a in arrays.items() if not k.startswith(f"{gate}.")}
