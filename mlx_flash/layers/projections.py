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
    (("gate_up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
    (("c_fc",), "c_proj"),
    (("c_fc_0", "c_fc_1"), "c_proj"),
    (("proj_1",), "proj_2"),
    (("w1", "w3"), "w2"),
    (("w1", "v1"), "w2"),
    (("w2", "w1"), "c_proj"),
    (("mlp_gate", "mlp_linear"), "mlp_resid"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
# Ways in that hold a gate and an up row of every neuron: all gates first, then all ups.
# Phi-3-small's up_proj holds both, too, but in pairs, a neuron's two rows together.
HALVES = ("gate_up_proj", "proj_1")


def projections(ffn: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """The names of an FFN's projections in and out, or None if it is no such FFN."""
    linears = {
        name
        for name, child in ffn.children().items()
        if isinstance(child, nn.Linear | nn.QuantizedLinear)
    }
    # An activation may be a module, too. Scalars it has serve every neuron alike; one
    # with larger weights would be a layer of its own.
    weights = {
        name.split(".")[0] for name, w in tree_flatten(ffn.parameters()) if w.ndim
    }
    for ins, out in PROJECTIONS:
        if linears == {*ins, out} == weights:
            rows = tuple(rows_per_neuron(ffn, name, out) for name in ins)
            paired = (ins, rows) == (("up_proj",), (2,))
            if paired or rows == tuple(2 if n in HALVES else 1 for n in ins):
                return ins, out
    return None


def count_neurons(out: nn.Module) -> int:
    """N, which the projection out of the neurons has as its width."""
    width = out.weight.shape[-1]
    return width * 32 // out.bits if packing(out) else width


def rows_per_neuron(ffn: nn.Module, name: str, out: str) -> int | None:
    """How many rows of a projection into the neurons belong to each; None if uneven."""
    rows, uneven = divmod(len(ffn[name].weight), count_neurons(ffn[out]))
    return None if uneven else rows


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

    `weight` is [n, D] or [n, b, D], a row a neuron; packed weights along D. One with
    `halves` has a gate and an up row a neuron, [n, 2, b, D], and gives [T, 2K] as the
    whole of it would: gates first. In pairs, they are [n, 2b, D] and give [T, 2K].
    """

    def __init__(self, linear: nn.Module, rows: int, halves: bool):
        super().__init__()
        self.packing, self.rows, self.halves = packing(linear), rows, halves
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
        if self.halves:
            n, T = len(self._arrays["weight"]), len(x)
            y = y.reshape(T, n, 2, -1).swapaxes(1, 2).reshape(T, -1)
        return y + self._bias() if "bias" in self else y

    def _bias(self) -> mx.array:
        if self._neurons is None:
            return self.bias
        if self.halves:
            return self.bias.reshape(2, -1)[:, self._neurons].reshape(-1)
        return self.bias.reshape(-1, self.rows)[self._neurons].reshape(-1)


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
        self.neurons = count_neurons(ffn[out])
        for name, child in ffn.children().items():
            if name not in self.names:
                self[name] = child  # an activation, whose scalars are parameters
        for name in ins:
            rows = rows_per_neuron(ffn, name, out)
            ffn[name] = self[name] = Into(ffn[name], rows, halves=name in HALVES)
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
