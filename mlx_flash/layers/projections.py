"""The linear layers of a dense FFN: what they are called, how they are packed.

Shapes: D model width, N neurons.
"""

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
    names = ("weight", "scales", "biases")
    return dict(zip(names, mx.quantize(rows, **packing), strict=False))


def neuron_rows(ffn: nn.Module) -> dict[str, mx.array]:
    """A row [D] of every projection for each neuron, [N, D], from float weights."""
    ins, out = known_projections(ffn)
    return {name: ffn[name].weight for name in ins} | {out: ffn[out].weight.T}
