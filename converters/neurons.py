"""Split a plain two-matrix FFN into neuron bundles and what stays in memory.

Neuron i is row i of the up projection and column i of the down projection, with its
element of the up bias. The bias stays resident: it is 1/d_model of the row, and in the
bundle it would push both halves off their alignment.
Shapes: D model width, N neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from .. import format
from ..errors import FlashError
from ..safetensors_io import DTYPES, Tensor, read_header, write_safetensors
from .source import finite

CHUNK_BYTES = 32_000_000
SAMPLE = 8  # neurons of each layer that are read back and compared

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
    """Write one layer's file, read some neurons back, and describe it.

    Raises:
        FlashError: If the disk is full, or gives back other bytes than it was given.
    """
    units, dims = layer.up.shape
    dtype = str(layer.up.dtype).removeprefix("mlx.core.")
    part_bytes = dims * DTYPES[dtype][1]
    unit_bytes = 2 * part_bytes

    def rows(start: int, stop: int) -> np.ndarray:
        pair = mx.stack([layer.up[start:stop], layer.down[:, start:stop].T], axis=1)
        return np.array(mx.contiguous(pair).view(mx.uint8)).reshape(-1, unit_bytes)

    def chunks() -> Iterator[memoryview]:
        step = max(CHUNK_BYTES // unit_bytes, 1)
        for start in range(0, units, step):
            yield rows(start, min(start + step, units)).data

    bundles = Tensor("uint8", (units, unit_bytes), chunks)
    sha256 = write_safetensors(path, {format.BUNDLES: bundles}, format.DATA_ALIGN)
    _, data_offset = read_header(path)
    with open(path, "rb") as file:
        for unit in np.linspace(0, units - 1, SAMPLE).astype(int).tolist():
            file.seek(data_offset + unit * unit_bytes)
            if file.read(unit_bytes) != rows(unit, unit + 1).tobytes():
                raise FlashError(
                    f"{path}: neuron {unit} reads back differently from what was "
                    "written. The disk is failing, or something else writes there."
                )
    parts = (
        format.Part("up", dtype, (dims,), 0, part_bytes),
        format.Part("down", dtype, (dims,), part_bytes, part_bytes),
    )
    return format.Layer(
        module=layer.module,
        file=f"{path.parent.name}/{path.name}",
        sha256=sha256,
        data_offset=data_offset,
        units=units,
        unit_bytes=unit_bytes,
        parts=parts,
        order="checkpoint",
        predictor=None,
    )
