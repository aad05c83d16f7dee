"""A model of neurons put together in memory, to look at what its FFNs are given.

Each FFN is the model's own module again, with the weights that its bundles have, in
the order that they have on flash. Whatever is fitted to it fits the folder's neurons.
"""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..assembly import empty_model
from ..checkpoints.config import read_config
from ..converters.arrays import load_arrays
from ..errors import FlashError
from ..layers.dense import hidden_values
from ..layers.kinds import NEURON, kind_of
from ..layers.predictor import Predictor
from ..layers.projections import known_projections, packing
from ..storage.manifest import Layer, Manifest
from ..storage.manifest_reading import read_manifest


class WatchedFFN(nn.Module):
    """A dense FFN that notes what it is given, or leaves out what is not predicted.

    Attributes:
        inputs: Filled by every call where it is a list: float32 [T, D].
        predictor: Names the neurons that count; None for all.
    """

    def __init__(self, ffn: nn.Module):
        super().__init__()
        self._ffn = ffn  # the underscore: in float32, whatever the model is cast to
        self._out = known_projections(ffn)[1]
        self._predictor: Predictor | None = None
        self._inputs: list[np.ndarray] | None = None

    @property
    def ffn(self) -> nn.Module:
        return self._ffn

    def watch(self) -> list[np.ndarray]:
        """Note the inputs of all calls from now on, in the list that is returned."""
        self._inputs = []
        return self._inputs

    def use(self, predictor: Predictor | None) -> None:
        """Compute what `predictor` names from now on, and note nothing."""
        self._predictor, self._inputs = predictor, None

    def __call__(self, x: mx.array) -> mx.array:
        tokens = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        if self._inputs is not None:
            self._inputs.append(np.array(tokens))
        h = hidden_values(self._ffn, tokens)
        if self._predictor is not None:
            h = mx.where(self._predictor(tokens), h, 0)
        return self._ffn[self._out](h).astype(x.dtype).reshape(x.shape)


def load_dense(folder: Path) -> tuple[nn.Module, Manifest, list[WatchedFFN]]:
    """The model, and its FFNs by layer.

    Raises:
        FlashError: If it has no neurons.
    """
    manifest = read_manifest(folder)
    if kind_of(manifest) is not NEURON:
        raise FlashError(
            f"{folder} has no neurons but {manifest.unit}s, for which nothing is "
            "predicted. Give a model of neurons, such as the demo model."
        )
    model = empty_model(manifest, read_config(folder), folder)
    resident = load_arrays(folder / manifest.resident.file)
    model.load_weights(list(resident.items()), strict=False)
    modules = dict(model.named_modules())
    layers = []
    for layer in manifest.layers:
        ffn = _restored(modules[layer.module], layer, folder)
        layers.append(WatchedFFN(ffn))
    paths = [layer.module for layer in manifest.layers]
    model.update_modules(tree_unflatten(list(zip(paths, layers, strict=True))))
    model.eval()
    return model, manifest, layers


def _restored(ffn: nn.Module, layer: Layer, folder: Path) -> nn.Module:
    """The FFN with the layer's weights, in float32."""
    stored = _parts(layer, folder)
    ins, out = known_projections(ffn)
    for name in (*ins, out):
        rows = stored[f"{name}.weight"]
        packed = packing(ffn[name])
        if packed is not None:
            scales, biases = stored[f"{name}.scales"], stored.get(f"{name}.biases")
            rows = mx.dequantize(rows, scales, biases, **packed)
        weight = rows.T if name == out else rows
        outputs, inputs = weight.shape
        linear = nn.Linear(inputs, outputs, bias="bias" in ffn[name])
        if "bias" in ffn[name]:
            linear.bias = ffn[name].bias
        linear.weight = weight
        ffn[name] = linear
    ffn.set_dtype(mx.float32)
    return ffn


def _parts(layer: Layer, folder: Path) -> dict[str, mx.array]:
    """What the bundles of a layer hold, a row for each neuron."""
    content = np.fromfile(
        folder / layer.file, np.uint8, layer.nbytes, offset=layer.data_offset
    )
    bundles = content.reshape(layer.units, layer.unit_bytes)
    parts = {}
    for part in layer.parts:
        raw = np.ascontiguousarray(bundles[:, part.offset : part.offset + part.bytes])
        rows = mx.array(raw).view(getattr(mx, part.dtype))
        parts[part.name] = rows.reshape(layer.units, *part.shape)
    return parts
