"""The linear layers of a dense FFN: what they are called, how they are packed.

Shapes: D model width, N neurons.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..arrays import parameters

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
PACKED = ("weight", "scales", "biases")  # the arrays of a quantised linear layer


def projections(ffn: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """The names of an FFN's projections in and out, or None if it is no such FFN."""
    linears = {
        name
        for name, child in ffn.children().items()
        if isinstance(child, nn.Linear | nn.QuantizedLinear)
    }
    # An activation may be a module, too. Scalars it has serve every neuron alike; one
    # with larger weights would be a layer of its own.
    weights = {name.split(".")[0] for name, w in parameters(ffn).items() if w.ndim}
    for ins, out in PROJECTIONS:
        if linears == {*ins, out} == weights:
            rows = tuple(rows_per_neuron(ffn, name, out) for name in ins)
            paired = (ins, rows) == (("up_proj",), (2,))
            if paired or rows == tuple(2 if n in HALVES else 1 for n in ins):
                return ins, out
    return None


def known_projections(ffn: nn.Module) -> tuple[tuple[str, ...], str]:
    """The same names, of an FFN that is known to have them."""
    names = projections(ffn)
    if names is None:
        raise ValueError(f"{type(ffn).__name__} is no FFN of two or three projections")
    return names


def count_neurons(out: nn.Module) -> int:
    """N, which the projection out of the neurons has as its width."""
    return input_width(out)


def input_width(linear: nn.Module) -> int:
    """How many values a linear layer takes, packed or not."""
    width = linear.weight.shape[-1]
    return width * 32 // linear.bits if packing(linear) else width


def rows_per_neuron(ffn: nn.Module, name: str, out: str) -> int | None:
    """How many rows of a projection into the neurons belong to each; None if uneven."""
    rows, uneven = divmod(len(ffn[name].weight), count_neurons(ffn[out]))
    return None if uneven else rows


def packing(linear: nn.Module) -> dict[str, Any] | None:
    """How a linear layer is quantised, as `mx.quantized_matmul` takes it."""
    if not isinstance(linear, nn.QuantizedLinear):
        return None
    return {key: getattr(linear, key) for key in ("group_size", "bits", "mode")}


def pack(rows: mx.array, packing: dict[str, Any] | None) -> dict[str, mx.array]:
    """Rows [N, D] as a linear layer holds them, quantised along D where asked for."""
    if packing is None:
        return {"weight": rows}
    return dict(zip(PACKED, mx.quantize(rows, **packing), strict=False))


def unpack(arrays: Mapping[str, mx.array], packing: dict[str, Any]) -> mx.array:
    """The floats that the arrays of a quantised linear layer stand for."""
    weight, scales = arrays["weight"], arrays["scales"]
    return mx.dequantize(weight, scales, arrays.get("biases"), **packing)


def unpacked(linear: nn.Module) -> mx.array:
    """The weight of a linear layer in floats, lazy where it is packed."""
    how = packing(linear)
    return linear.weight if how is None else unpack(linear, how)


def by_neuron(ffn: nn.Module, name: str, array: mx.array) -> mx.array:
    """An array of a projection into the neurons, [N, …], one entry for each.

    One row of [R] is [N, R]. A gate and an up row are [N, 2, 1, R] where the projection
    holds all gates first, and [N, 2, R] where they come in pairs. Biases have no R.
    """
    count, tail = count_neurons(ffn[known_projections(ffn)[1]]), array.shape[1:]
    if name in HALVES:
        return array.reshape(2, count, 1, *tail).swapaxes(0, 1)
    if len(array) > count:
        return array.reshape(count, -1, *tail)
    return array


def from_neurons(ffn: nn.Module, name: str, array: mx.array) -> mx.array:
    """What `by_neuron` was given, of what it made of it."""
    if name in HALVES:
        return array.swapaxes(0, 1).flatten(0, 2)
    if len(ffn[name].weight) > len(array):
        return array.flatten(0, 1)
    return array


def neuron_rows(ffn: nn.Module) -> dict[str, mx.array]:
    """The rows of every projection for each neuron, in floats: see `by_neuron`.

    Of the projection out of the neurons it is the column, [N, D].
    """
    ins, out = known_projections(ffn)
    rows = {name: by_neuron(ffn, name, unpacked(ffn[name])) for name in ins}
    return rows | {out: unpacked(ffn[out]).T}


def neuron_parts(ffn: nn.Module) -> dict[str, mx.array]:
    """What bundles of neurons hold of an FFN that may be packed, [N, …] each.

    Ways in keep their packing. The way out is packed across neurons, and is packed anew
    along D.
    """
    ins, out = known_projections(ffn)
    parts = {
        f"{name}.{key}": by_neuron(ffn, name, array)
        for name in ins
        for key, array in ffn[name].items()
        if key != "bias" and isinstance(array, mx.array)
    }
    column = pack(unpacked(ffn[out]).T, packing(ffn[out]))
    return parts | {f"{out}.{key}": array for key, array in column.items()}


def deciding_rows(ffn: nn.Module) -> tuple[mx.array, mx.array]:
    """(weight [N, D], bias [N]) of the projection that decides who is zero: gates."""
    name = known_projections(ffn)[0][0]
    weight = by_neuron(ffn, name, ffn[name].weight)
    bias = ffn[name].get("bias")
    count, dims = len(weight), weight.shape[-1]
    if bias is None:
        bias = mx.zeros(weight.size // dims)
    return (
        weight.reshape(count, -1, dims)[:, 0],
        by_neuron(ffn, name, bias).reshape(count, -1)[:, 0],
    )
