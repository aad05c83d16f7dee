"""How a checkpoint stores its weights, found before any of them is read.

Names and dtypes are in the headers of its safetensors files, the quantisation is in
config.json.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..arrays import parameters
from ..errors import FlashError
from ..layers.kinds import UnitKind
from ..storage.layout import lay_out
from ..storage.manifest import FORMAT_VERSION, Layer, Manifest, Weights
from ..storage.safetensors import DTYPES, read_header

Tensors = dict[str, tuple[str, int]]  # (safetensors code of the dtype, values) by name

FLOATS = {code: name for name, (code, _) in DTYPES.items() if "float" in name}
# How mlx-lm packs what other tools have quantised; of these it keeps the packing.
FOREIGN = {
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
}


def weight_bytes(module: nn.Module) -> int:
    """Of all weights of a module, which may be lazy."""
    return sum(array.nbytes for array in parameters(module).values())


def layer_of(module: str, arrays: Mapping[str, mx.array], file: str = "") -> Layer:
    """The manifest's layer for units that no bundle file holds.

    Args:
        module: Its path in the model.
        arrays: Each part of all units by name, [units, …]; only sizes are looked at.
        file: The one to name in messages.
    """
    parts = lay_out(arrays)
    return Layer(
        module=module,
        file=file,
        sha256="",
        data_offset=0,
        units=len(next(iter(arrays.values()))),
        unit_bytes=sum(part.bytes for part in parts),
        parts=parts,
        order="checkpoint",
        predictor=None,
    )


def manifest_of(
    source: str,
    model: nn.Module,
    model_type: str,
    kind: UnitKind,
    dtype: str,
    layers: tuple[Layer, ...],
    predictor_bytes: int = 0,
) -> Manifest:
    """The manifest that a checkpoint would have: sizes, and no files."""
    resident_bytes = weight_bytes(model) - sum(layer.nbytes for layer in layers)
    return Manifest(
        format_version=FORMAT_VERSION,
        source=source,
        revision=None,
        model_type=model_type,
        unit=kind.name,
        activation=kind.activation,
        dtype=dtype,
        resident=Weights("", "", resident_bytes),
        predictors=Weights("", "", predictor_bytes) if predictor_bytes else None,
        calibration=None,
        layers=layers,
    )


def header_tensors(files: Iterable[Path]) -> Tensors:
    """Every tensor that the headers of safetensors files name."""
    found: Tensors = {}
    for file in files:
        for name, entry in read_header(file)[0].items():
            found[name] = (entry["dtype"], prod(entry["shape"]))
    return found


def indexed_names(folder: Path) -> set[str]:
    """The names of the tensors, from the index beside the shards; empty without one."""
    try:
        raw = json.loads((folder / "model.safetensors.index.json").read_text())
        return set(raw["weight_map"])
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def named_dtype(config: dict) -> str | None:
    """The float dtype that config.json names for the weights."""
    text = config.get("text_config") or {}
    for key in ("dtype", "torch_dtype"):
        for named in (config.get(key), text.get(key)):
            if named in FLOATS.values():
                return named
    return None


def main_dtype(tensors: Iterable[tuple[str, int]], config_file: Path) -> str:
    """The float dtype of the most values.

    Args:
        tensors: (dtype, values) of each, in safetensors' codes or by name.
        config_file: Where the dtype could have been named, for the error.

    Raises:
        FlashError: If no tensor has a float dtype.
    """
    values: Counter[str] = Counter()
    for code, count in tensors:
        if (dtype := FLOATS.get(code, code)) in FLOATS.values():
            values[dtype] += count
    if not values:
        raise FlashError(
            f"{config_file} does not say which dtype the weights have, and there is no "
            'safetensors file that would. Add "dtype": "float16", or what they were '
            "saved in (to convert, --dtype float16 will do)."
        )
    return values.most_common(1)[0][0]


def quantization(config: dict, name: str) -> dict | None:
    """How the weights are quantised, as mlx-lm would find it.

    Raises:
        FlashError: If mlx-lm would pack them anew, which gives unknown sizes.
    """
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


def quantize(model: nn.Module, packing: dict, names: set[str]) -> None:
    """Pack the modules for which the checkpoint has scales.

    Args:
        packing: From `quantization`.
        names: The checkpoint's tensors. If none of them is a scale, because they are
            not known, everything that can be packed is.
    """
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


def packing_of(model: nn.Module) -> dict[str, dict]:
    """How each of a model's quantised modules is packed, by its path."""
    packed = {}
    for path, module in model.named_modules():
        if hasattr(module, "bits") and hasattr(module, "group_size"):
            packed[path] = {k: getattr(module, k) for k in ("group_size", "bits")}
            packed[path]["mode"] = getattr(module, "mode", "affine")
            if getattr(module, "global_scale", None) is not None:
                packed[path]["global_scale"] = True
    return packed
