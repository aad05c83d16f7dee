"""What a model is made of, found from its configuration alone.

From a flash folder, a checkpoint's folder, or a repository on the hub of which no
weights have come: the model is built without weights, and lazy arrays have sizes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..assembly import _empty_model
from ..checkpoints.config import make_model, read_config
from ..checkpoints.hub import find_config, remote_tensors, weight_sizes
from ..errors import FlashError
from ..layers.block import block_parts
from ..layers.dense import dense_ffns, gives_zeros
from ..layers.expert import switch_layers, switch_parts
from ..layers.predictor import Predictor, default_rank, possible_bits
from ..layers.projections import neuron_rows, projections
from ..memory.footprint import Shapes, find_shapes
from ..models.registry import get_model_classes
from ..storage.manifest import MANIFEST, Layer, Manifest, Part, Weights, parse_manifest
from ..storage.safetensors import read_header

CODES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# How mlx-lm packs what other tools have quantised; of these it keeps the packing.
FOREIGN = {
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
}


@dataclass(frozen=True)
class Outline:
    """A model before any weight of it is read.

    Attributes:
        kind: "flash folder" or "checkpoint".
        model, config, manifest, shapes: As after loading; the manifest of a checkpoint
            is made up, with the units that `convert` would write.
        download_bytes: Of weights that are still on the hub.
        disk_bytes: What it takes on disk besides the download, to be run.
        in_place: Whether experts are read where the checkpoint has them.
    """

    kind: str
    model: nn.Module
    config: dict
    manifest: Manifest
    shapes: Shapes
    download_bytes: int
    disk_bytes: int
    in_place: bool


def outline(name: str | Path, revision: str | None = None) -> Outline:
    """Find out what `name`, a folder or a hub name, is made of.

    Raises:
        FlashError: If there is no such model, its kind is not supported, or nothing of
            it could be brought from flash.
    """
    folder = find_config(name, revision)
    sizes: dict[str, int] = {}
    remote = folder.parent.name == "snapshots" and not Path(name).is_dir()
    if remote:
        sizes = weight_sizes(str(name), folder.name)
    download = sum(sizes.values())
    config = read_config(folder)
    if (folder / MANIFEST).exists():
        manifest = parse_manifest(folder)
        model = _empty_model(manifest, config, folder)
        shapes = find_shapes(_empty_model(manifest, config, folder), config)
        return Outline(
            "flash folder", model, config, manifest, shapes, download, 0, False
        )

    def tensors() -> dict[str, tuple[str, int]]:
        """(dtype, values) by name, from the headers of the weight files."""
        if not remote:
            return _local_tensors(folder)
        shards = [file for file in sizes if file.endswith(".safetensors")]
        found = {}
        for shard in shards[:1]:  # one shard's header is enough to know the dtype
            found = remote_tensors(str(name), shard, folder.name)
        return found

    packing = _packing(config, str(name))
    names = _names(folder) or (set() if remote else set(_local_tensors(folder)))
    dtype = _dtype(config, tensors, folder)

    def build() -> nn.Module:
        model = make_model(*get_model_classes(config), config, folder)
        if packing:
            _quantize(model, packing, names)
        model.set_dtype(getattr(mx, dtype))
        return model

    model = build()
    manifest = _imagined(model, config, dtype, str(name))
    # Experts that are tensors of their own have to be brought together first.
    apart = any(".experts.0." in tensor for tensor in names)
    in_place = manifest.unit == "expert" and not apart
    disk = 0 if in_place else manifest.model_bytes + manifest.predictor_bytes
    shapes = find_shapes(build(), config)
    return Outline(
        "checkpoint", model, config, manifest, shapes, download, disk, in_place
    )


def _imagined(model: nn.Module, config: dict, dtype: str, name: str) -> Manifest:
    """The manifest that a checkpoint would get if it were converted."""
    modules, unit = switch_layers(model), "expert"
    if not modules:
        modules = dense_ffns(model)
        able = bool(modules) and not _packing(config, name)
        zeros = able and gives_zeros(next(iter(modules.values())))
        unit = "neuron" if zeros else "block"
    if not modules:
        raise FlashError(
            f"{name}: a model of type {config['model_type']!r} has no FFN that can be "
            "brought from flash: neither experts (SwitchGLU or SwitchMLP of mlx-lm) "
            "nor dense FFNs of two or three projections."
        )
    layers, on_flash, predictors = [], 0, 0
    for index, (path, module) in enumerate(modules.items()):
        if unit == "expert":
            arrays = switch_parts(module)
        elif unit == "block":
            arrays = block_parts(module)
        else:
            rows = neuron_rows(module)
            arrays = {f"{name}.weight": weight for name, weight in rows.items()}
            predictors += _predictor_bytes(module, index, len(modules), dtype)
        layers.append(_layer(path, arrays))
        on_flash += layers[-1].nbytes
    total = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    return Manifest(
        format_version=1,
        source=name,
        revision=None,
        model_type=config["model_type"],
        unit=unit,
        activation="module",
        dtype=dtype,
        resident=Weights("", "", total - on_flash),
        predictors=Weights("", "", predictors) if predictors else None,
        calibration=None,
        layers=tuple(layers),
    )


def _layer(path: str, arrays: dict[str, mx.array]) -> Layer:
    """A layer of units, the first axis of every array."""
    parts, offset = [], 0
    units = len(next(iter(arrays.values())))
    for name, array in arrays.items():
        nbytes = array.nbytes // units
        dtype = str(array.dtype).removeprefix("mlx.core.")
        parts.append(Part(name, dtype, tuple(array.shape[1:]), offset, nbytes))
        offset += nbytes
    return Layer(path, "", "", 0, units, offset, tuple(parts), "checkpoint", None)


def _predictor_bytes(ffn: nn.Module, index: int, layers: int, dtype: str) -> int:
    """Of the predictor that `convert` gives a layer by default."""
    (first, *_), _ = projections(ffn)
    units, dims = ffn[first].weight.shape
    rank = default_rank(index, layers, dims)
    predictor = Predictor(dims, units, rank, possible_bits(dims, rank))
    predictor.set_dtype(getattr(mx, dtype))
    return sum(array.nbytes for _, array in tree_flatten(predictor.parameters()))


def _names(folder: Path) -> set[str]:
    """The checkpoint's tensors, from the index that lies beside its shards."""
    try:
        raw = json.loads((folder / "model.safetensors.index.json").read_text())
        return set(raw["weight_map"])
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def _local_tensors(folder: Path) -> dict[str, tuple[str, int]]:
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        header, _ = read_header(file)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            found[name] = entry["dtype"], last - first
    return found


def _dtype(config: dict, tensors: Callable, folder: Path) -> str:
    """What most weights are stored in: as config.json says, else as a header does."""
    text = config.get("text_config") or {}
    for key in ("dtype", "torch_dtype"):
        for named in (config.get(key), text.get(key)):
            if named in CODES.values():
                return named
    floats = [(size, CODES[d]) for d, size in tensors().values() if d in CODES]
    if not floats:
        raise FlashError(
            f"{folder / 'config.json'} does not say which dtype the weights have, and "
            'there is no safetensors file that would. Add "dtype": "float16", or '
            "what they were saved in."
        )
    return max(floats)[1]


def _packing(config: dict, name: str) -> dict | None:
    """How the weights are quantised, as mlx-lm would find it."""
    text = config.get("text_config") or {}
    if found := config.get("quantization"):
        return found
    found = config.get("quantization_config") or text.get("quantization_config")
    if not found or {"group_size", "bits"} <= found.keys():
        return found
    method = found.get("quant_method")
    if method in FOREIGN:
        return FOREIGN[method]
    raise FlashError(
        f"{name} is quantised in a way ({method}) whose sizes cannot be told before "
        "loading. Plan with a version in mlx-lm's own quantisation, or unquantised."
    )


def _quantize(model: nn.Module, packing: dict, names: set[str]) -> None:
    """Pack what the checkpoint has scales for; without its names, all that can be."""
    named = any(name.endswith(".scales") for name in names)
    group = packing.get("group_size", 64)

    def wanted(path: str, module: nn.Module):
        if path in packing:
            return packing[path]
        if not hasattr(module, "to_quantized") or "weight" not in module:
            return False
        if named:
            return f"{path}.scales" in names
        return module.weight.shape[-1] % group == 0

    nn.quantize(
        model,
        group_size=group,
        bits=packing.get("bits", 4),
        mode=packing.get("mode", "affine"),
        class_predicate=wanted,
    )
