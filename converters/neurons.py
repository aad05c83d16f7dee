"""Split a plain two-matrix FFN into neuron bundles and what stays in memory.

Neuron i is row i of the up projection and column i of the down projection, with its
element of the up bias. The bias stays resident: it is 1/d_model of the row, and in the
bundle it would push both halves off their alignment.
Shapes: D model width, N neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .. import format
from ..errors import FlashError
from . import bundles
from .source import finite

# model_type → path of the FFN inside a layer, its up and down projections
FFN_PATHS = {
    "opt": ("mlp", "fc1", "fc2"),
    "falcon": ("mlp", "dense_h_to_4h", "dense_4h_to_h"),
    "persimmon": ("mlp", "dense_h_to_4h", "dense_4h_to_h"),
    "nemotron": ("mlp", "up_proj", "down_proj"),
}


@dataclass(frozen=True)
class NeuronLayer:
    """One FFN's weights as MLX arrays: up [N, D], down [D, N], up_bias [N] or None."""

    module: str
    up: mx.array
    down: mx.array
    up_bias: mx.array | None


def ffn_modules(model, model_type: str) -> list[str]:
    """The path of every layer's FFN in the model's module tree, in order."""
    inner = FFN_PATHS[model_type][0]
    layers = {id(layer) for layer in model.layers}
    paths = [name for name, module in model.named_modules() if id(module) in layers]
    paths.sort(key=lambda path: int(path.rsplit(".", 1)[1]))
    return [f"{path}.{inner}" for path in paths]


def neuron_layer(
    weights: dict[str, mx.array], module: str, model_type: str, dtype: mx.Dtype
) -> NeuronLayer:
    """Take one FFN from a checkpoint's weights, in `dtype`, checked for NaN."""
    _, up, down = FFN_PATHS[model_type]

    def take(name):
        path = f"{module}.{name}"
        return finite(path, weights[path].astype(dtype)) if path in weights else None

    layer = NeuronLayer(
        module, take(f"{up}.weight"), take(f"{down}.weight"), take(f"{up}.bias")
    )
    if layer.up is None or layer.down is None or layer.up.shape != layer.down.T.shape:
        raise FlashError(f"The checkpoint has no {module}.{up} with a fitting {down}.")
    return layer


def resident_names(names, modules: list[str], model_type: str) -> dict[str, str]:
    """The weights that stay in memory: name in the checkpoint → name when loaded."""
    _, up, down = FFN_PATHS[model_type]
    renamed = {}
    for module in modules:
        renamed[f"{module}.{up}.bias"] = f"{module}.up_bias"
        renamed[f"{module}.{down}.bias"] = f"{module}.down_bias"
    on_flash = {f"{module}.{part}.weight" for module in modules for part in (up, down)}
    return {name: renamed.get(name, name) for name in names if name not in on_flash}


def write_bundles(path: Path, layer: NeuronLayer) -> format.Layer:
    """Write one layer's file: up row and down column of each neuron, side by side."""
    parts = {"up": layer.up, "down": layer.down.T}
    return bundles.write_bundles(path, layer.module, parts)
