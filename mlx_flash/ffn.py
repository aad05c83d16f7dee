"""An FFN's projections, computed from slots.

The model's own FFN module does the computing, activation and gating included. Only its
linear layers are exchanged, for projections over whichever neurons are in memory, so
any FFN that is a sum over its neurons works as it stands in mlx-lm.
Shapes: T tokens, D model width, N neurons, K of them now, n units now.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

# (projections into the neurons, projection out of them), by the names models use; of
# two ways in, the first is the gate.
PROJECTIONS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("w1", "w3"), "w2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)


def projections(ffn: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """The names of an FFN's projections in and out, or None if it is no such FFN."""
    linears = {
        name
        for name, child in ffn.children().items()
        if isinstance(child, nn.Linear | nn.QuantizedLinear)
    }
    # An activation may be a module, too; one with weights would be a layer of its own.
    weights = {name.split(".")[0] for name, _ in tree_flatten(ffn.parameters())}
    for ins, out in PROJECTIONS:
        if linears == {*ins, out} == weights:
            return ins, out
    return None


def packing(linear: nn.Module) -> dict | None:
    """How a linear layer is quantised, as `mx.quantized_matmul` takes it."""
    if not isinstance(linear, nn.QuantizedLinear):
        return None
    return {key: getattr(linear, key) for key in ("group_size", "bits", "mode")}


def pack(rows: mx.array, packing: dict | None) -> dict[str, mx.array]:
    """Rows [N, D] as a linear layer holds them, quantised along D where asked for."""
    if packing is None:
        return {"weight": rows}
    names = ("weight", "scales", "biases")
    return dict(zip(names, mx.quantize(rows, **packing), strict=False))


def neuron_rows(ffn: nn.Module) -> dict[str, mx.array]:
    """A row [D] of every projection for each neuron, [N, D], from float weights."""
    ins, out = projections(ffn)
    return {name: ffn[name].weight for name in ins} | {out: ffn[out].weight.T}


class Into(nn.Module):
    """A projection into the neurons that `show` last named: [T, D] → [T, K].

    `weight` is [n, D] or [n, b, D], a row a neuron; packed weights along D.
    """

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.packing = packing(linear)
        if "bias" in linear:
            self.bias = linear.bias

    def show(self, arrays: dict[str, mx.array], neurons=None) -> None:
        """Compute with `arrays`, of the neurons that `neurons` indexes the bias by."""
        self._arrays, self._neurons = arrays, neurons

    def __call__(self, x: mx.array) -> mx.array:
        a = {k: v.reshape(-1, v.shape[-1]) for k, v in self._arrays.items()}
        if self.packing is None:
            y = x @ a["weight"].T
        else:
            y = mx.quantized_matmul(
                x, a["weight"], a["scales"], a.get("biases"), True, **self.packing
            )
        if "bias" not in self:
            return y
        return y + (self.bias if self._neurons is None else self.bias[self._neurons])


class OutOf(nn.Module):
    """The projection out of them: [T, K] → [T, D], without its bias.

    A float or re-quantised `weight` is [n, D] or [n, b, D], a row a neuron. With
    `columns` it is [n, D, b'], the checkpoint's own packing along the neurons.
    """

    def __init__(self, linear: nn.Module, columns: bool = False):
        super().__init__()
        self.packing, self.columns = packing(linear), columns
        if "bias" in linear:
            self.bias = linear.bias  # added once by the FFN, not once a wave

    def show(self, arrays: dict[str, mx.array], through=None) -> None:
        """Compute with `arrays` from now on, with what `through` makes of h first."""
        self._arrays, self._through = arrays, through

    def __call__(self, h: mx.array) -> mx.array:
        a = self._arrays
        if self._through is not None:
            h = self._through(h)
        if self.columns and self.packing:
            n = len(a["weight"])
            h = h.reshape(len(h), n, -1).swapaxes(0, 1)
            y = self._packed(h, a, transpose=True)
            return y.astype(mx.float32).sum(axis=0)
        a = {k: v.reshape(-1, v.shape[-1]) for k, v in a.items()}
        if self.packing is None:
            return h @ a["weight"]
        return self._packed(h, a, transpose=False)

    def _packed(self, h: mx.array, a: dict[str, mx.array], transpose: bool) -> mx.array:
        return mx.quantized_matmul(
            h, a["weight"], a["scales"], a.get("biases"), transpose, **self.packing
        )


class SlotFFN(nn.Module):
    """An FFN module with its projections exchanged for ones over slots."""

    def __init__(self, ffn: nn.Module, columns: bool = False):
        super().__init__()
        ins, out = projections(ffn)
        self.names = (*ins, out)
        for name in ins:
            ffn[name] = self[name] = Into(ffn[name])
        ffn[out] = self[out] = OutOf(ffn[out], columns)
        # The underscore keeps the module, whose projections are ours, out of the
        # parameters: they would be there twice.
        self._ffn = ffn

    def compute(
        self,
        x: mx.array,
        parts: dict[str, mx.array],
        rows,
        neurons: mx.array | None = None,
        through: Callable[[mx.array], mx.array] | None = None,
    ) -> mx.array:
        """The FFN of x [T, D] over some of the slots.

        Args:
            rows: Which slots, as MLX arrays are indexed; None for all.
            neurons: Whose they are, None where all are asked for in order.
            through: Given the hidden values [T, K], says what goes on in their place.
        """
        out = self.names[-1]
        for name in self.names:
            arrays = {
                key.removeprefix(f"{name}."): array if rows is None else array[rows]
                for key, array in parts.items()
                if key.startswith(f"{name}.")
            }
            if name != out:
                self[name].show(arrays, neurons)
            else:
                self[out].show(arrays, through)
        y = self._ffn(x)
        for name in self.names:
            self[name].show({})  # whoever closes the model gets the slots' memory back
        return y

    def add_bias(self, y: mx.array) -> mx.array:
        out = self[self.names[-1]]
        return y + out.bias if "bias" in out else y
