"""Build a model whose FFNs are on flash, without reading any of its weights.

From a flash folder, or in place from a stock mlx-lm checkpoint whose experts can be
read from its shards as they lie there. FFN modules are exchanged by their type.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .checkpoints.config import make_model, read_config
from .checkpoints.stock import Stock, load_stock
from .errors import FlashError
from .layers.block import BlockFFN, cut_blocks
from .layers.expert import ExpertFFN, switch_layers, switch_parts
from .layers.lookahead import router_guess
from .layers.neuron import NeuronFFN
from .layers.predictor import Predictor
from .layers.projections import pack, packing, projections
from .memory.footprint import Shapes, find_shapes
from .models.registry import get_model_classes
from .storage.manifest import MANIFEST, Layer, Manifest, Part, Weights, read_manifest
from .storage.reader import Extent
from .storage.safetensors import DTYPES


@dataclass(frozen=True)
class Assembled:
    """A model before its weights are read.

    Attributes:
        model, config: As mlx-lm has them, FFNs exchanged for `layers`.
        manifest: The flash folder's, or one made up for a stock checkpoint.
        layers: The FFN modules, one for each of the manifest's layers.
        extents: Where each layer's units lie, or None: in the layer's bundle file.
        shapes: For the budget.
    """

    model: nn.Module
    config: dict
    manifest: Manifest
    layers: list
    extents: list[list[Extent]] | None
    shapes: Shapes

    def look_ahead(self) -> None:
        """Have every layer guess what the next one will need, where that is known."""
        modules = dict(self.model.named_modules())
        entries = self.manifest.layers[1:]
        pairs = zip(self.layers, self.layers[1:], entries, strict=False)
        for layer, following, entry in pairs:
            if isinstance(layer, NeuronFFN):
                layer.look_ahead(following)
            elif isinstance(layer, ExpertFFN):
                block = modules[entry.module.rpartition(".")[0]]
                guess = router_guess(block, entry.units, self.shapes.width)
                if guess is not None:
                    layer.look_ahead(following, guess)


def assemble(folder: Path, predictor: bool) -> Assembled:
    """Assemble whatever `folder` holds.

    Raises:
        FlashError: If it is damaged, contradicts itself, or has nothing to exchange.
    """
    if (folder / MANIFEST).exists() or not _is_checkpoint(folder):
        return _from_flash(folder, predictor)
    return _in_place(load_stock(folder))


def can_stream(folder: Path) -> bool:
    """Whether a checkpoint with this config.json has experts to stream in place."""
    config = read_config(folder)
    model = make_model(*get_model_classes(config), config, folder)
    return bool(switch_layers(model))


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").exists() and any(folder.glob("model*.safetensors"))


def _from_flash(folder: Path, predictor: bool) -> Assembled:
    manifest = read_manifest(folder)
    config = read_config(folder)
    # A model of their own: Kimi K3 keeps what it computed from weights in its first run
    shapes = find_shapes(_empty_model(manifest, config, folder), config)
    model = _empty_model(manifest, config, folder)
    exchange = EXCHANGES[manifest.unit]
    layers = exchange(model, manifest, predictor, folder)
    names = [entry.module for entry in manifest.layers]
    model.update_modules(tree_unflatten(list(zip(names, layers, strict=True))))
    _load_resident(model, manifest, predictor, folder)
    return Assembled(model, config, manifest, layers, None, shapes)


def _empty_model(manifest: Manifest, config: dict, folder: Path) -> nn.Module:
    """The folder's model with weights that nothing evaluates."""
    model = make_model(*get_model_classes(config), config, folder)
    _quantize(model, config.get("quantization"))
    model.set_dtype(getattr(mx, manifest.dtype))
    return model


def _quantize(model: nn.Module, quantization: dict | None) -> None:
    """Quantise what the folder names, each module as the folder says."""
    if not quantization:
        return
    named = {k: v for k, v in quantization.items() if isinstance(v, dict)}
    nn.quantize(
        model,
        class_predicate=lambda path, module: (
            named.get(path, False) if hasattr(module, "to_quantized") else False
        ),
    )


def _modules(model: nn.Module, manifest: Manifest, folder: Path) -> list[nn.Module]:
    found = dict(model.named_modules())
    for entry in manifest.layers:
        if entry.module not in found:
            raise FlashError(
                f"{folder}: the manifest exchanges {entry.module}, which a model of "
                f"type {manifest.model_type!r} does not have. Convert it again."
            )
    return [found[entry.module] for entry in manifest.layers]


def _exchange_neurons(
    model: nn.Module, manifest: Manifest, predictor: bool, folder: Path
) -> list[NeuronFFN]:
    layers = []
    olds = _modules(model, manifest, folder)
    for entry, old in zip(manifest.layers, olds, strict=True):
        want, dims = _neuron_shapes(old, getattr(mx, manifest.dtype))
        have = {p.name: (p.dtype, (entry.units, *p.shape)) for p in entry.parts}
        if have != want:
            raise FlashError(
                f"{folder}: bundles of {entry.module} hold {have}, its config.json "
                f"and {MANIFEST} ask for {want}. Convert the model again."
            )
        facts = entry.predictor if predictor else None
        try:
            guess = facts and Predictor(dims, entry.units, facts.rank, facts.bits)
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise FlashError(
                f"{folder / MANIFEST}, {entry.module}: no predictor of rank "
                f"{facts.rank} and {facts.bits} bits is possible "
                f"({str(error).splitlines()[0]})."
            ) from error
        layers.append(NeuronFFN(old, guess))
    return layers


def _neuron_shapes(ffn: nn.Module, dtype: mx.Dtype) -> tuple[dict, int]:
    """(dtype and shape of every part of all neurons, D), or nothing if it has none."""
    if projections(ffn) is None:
        return {}, 0
    ins, out = projections(ffn)
    neurons, dims = len(ffn[ins[0]].weight), len(ffn[out].weight)
    # Nothing evaluates these: it is their shapes that are asked for.
    rows = mx.zeros((neurons, dims), dtype)
    shapes = {}
    for name in (*ins, out):
        for key, array in pack(rows, packing(ffn[name])).items():
            kind = str(array.dtype).removeprefix("mlx.core.")
            shapes[f"{name}.{key}"] = (kind, array.shape)
    return shapes, dims


def _exchange_experts(
    model: nn.Module, manifest: Manifest, predictor: bool, folder: Path
) -> list[ExpertFFN]:
    layers = []
    olds = _modules(model, manifest, folder)
    for entry, old in zip(manifest.layers, olds, strict=True):
        want = {n: (entry.units, *a.shape[1:]) for n, a in switch_parts(old).items()}
        have = {p.name: (entry.units, *p.shape) for p in entry.parts}
        if want != have:
            some = sorted(want.items() ^ have.items())[0][0]
            raise FlashError(
                f"{folder}: bundles of {entry.module} and its config.json disagree "
                f"about {some}. Convert the model again."
            )
        layers.append(ExpertFFN(old))
    return layers


def _exchange_blocks(
    model: nn.Module, manifest: Manifest, predictor: bool, folder: Path
) -> list[BlockFFN]:
    layers = []
    olds = _modules(model, manifest, folder)
    for entry, old in zip(manifest.layers, olds, strict=True):
        have = {p.name: (entry.units, *p.shape) for p in entry.parts}
        if have != _block_shapes(old, entry.units):
            raise FlashError(
                f"{folder}: bundles of {entry.module} and its config.json disagree "
                "about its neurons. Convert the model again."
            )
        layers.append(BlockFFN(old))
    return layers


def _block_shapes(ffn: nn.Module, blocks: int) -> dict:
    """The shape of every part of all blocks, or nothing if it cannot be cut so."""
    if projections(ffn) is None:
        return {}
    try:
        return {name: a.shape for name, a in cut_blocks(ffn, blocks).items()}
    except ValueError:  # neurons that are no whole blocks
        return {}


EXCHANGES = {
    "neuron": _exchange_neurons,
    "expert": _exchange_experts,
    "block": _exchange_blocks,
}


def _load_resident(
    model: nn.Module, manifest: Manifest, predictor: bool, folder: Path
) -> None:
    weights = _load_file(folder / manifest.resident.file)
    if predictor and manifest.predictors:
        weights |= _load_file(folder / manifest.predictors.file)
    try:
        model.load_weights(list(weights.items()), strict=True)
    except ValueError as error:
        raise FlashError(
            f"{folder}: its weights do not fit its config.json "
            f"({str(error).splitlines()[0]}). Convert the model again."
        ) from error
    model.eval()


def _load_file(path: Path) -> dict[str, mx.array]:
    try:
        return mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FlashError(f"{path} cannot be read: {reason}.") from error


def _in_place(stock: Stock) -> Assembled:
    """Experts straight from the shards of a stock checkpoint: a read for each part."""
    model, folder = stock.model, stock.folder
    shapes = find_shapes(model, stock.config)
    switches = switch_layers(model)
    if not switches:
        raise FlashError(
            f"{folder} has no flash.json, and no mixture-of-experts layers (SwitchGLU "
            "or SwitchMLP of mlx-lm) that could be streamed as they are. Convert it: "
            f"mlx-flash convert {folder} -o {folder.name}-flash"
        )
    entries, extents, layers = [], [], []
    for module, switch in switches.items():
        parts, places = _stock_parts(stock, module, switch)
        entries.append(
            Layer(
                module=module,
                file=places[0].path.name,
                sha256="",
                data_offset=0,
                units=switch_experts(switch),
                unit_bytes=sum(p.bytes for p in parts),
                parts=tuple(parts),
                order="checkpoint",
                predictor=None,
            )
        )
        extents.append(places)
        layers.append(ExpertFFN(switch))
    model.update_modules(tree_unflatten(list(zip(switches, layers, strict=True))))
    resident = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    dtype = stock.dtype()
    manifest = Manifest(
        format_version=1,
        source=folder.name,
        revision=None,
        model_type=stock.config["model_type"],
        unit="expert",
        activation="switch",
        dtype=dtype,
        resident=Weights(file="", sha256="", bytes=resident),
        predictors=None,
        calibration=None,
        layers=tuple(entries),
    )
    return Assembled(model, stock.config, manifest, layers, extents, shapes)


def switch_experts(switch: nn.Module) -> int:
    return len(next(iter(switch_parts(switch).values())))


def _stock_parts(
    stock: Stock, module: str, switch: nn.Module
) -> tuple[list[Part], list[Extent]]:
    parts, extents = [], []
    for index, (name, array) in enumerate(switch_parts(switch).items()):
        place = stock.place(array)
        dtype = str(array.dtype).removeprefix("mlx.core.")
        if place is None or place.bytes != array.nbytes or dtype not in DTYPES:
            raise FlashError(
                f"{stock.folder}: {module}.{name} does not lie in the shards as mlx-lm "
                "uses it (experts stored one by one, or transposed). Convert it: "
                f"mlx-flash convert {stock.folder} -o {stock.folder.name}-flash"
            )
        nbytes = array.nbytes // len(array)
        parts.append(Part(name, dtype, tuple(array.shape[1:]), 0, nbytes))
        extents.append(Extent(place.file, place.offset, nbytes, ((index, 0, nbytes),)))
    offset = 0
    for i, part in enumerate(parts):
        parts[i] = replace(part, offset=offset)
        offset += part.bytes
    return parts, extents
