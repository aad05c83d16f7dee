"""What a flash folder holds besides bundles: resident weights, predictors, config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..checkpoints.hub import CONFIG_FILES
from ..errors import FlashError
from ..storage import manifest as format
from ..storage.safetensors import Tensor, write_safetensors
from .source import Source, finite
from .workfolder import WorkFolder


def check_names(source: Source, model) -> None:
    """Hold the checkpoint's tensors against those the model has.

    Raises:
        FlashError: Naming the first tensors that are missing, unknown or misshapen.
    """
    want = {name: w.shape for name, w in tree_flatten(model.parameters())}
    have = {name: w.shape for name, w in source.weights().items()}
    for names, what in (
        (want.keys() - have.keys(), "lacks"),
        (have.keys() - want.keys(), "has weights this model type does not know:"),
        ({n for n in want.keys() & have.keys() if want[n] != have[n]}, "has misshapen"),
    ):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise FlashError(f"The checkpoint {source.name} {what} {some}.")


def write_weights(path: Path, arrays: dict[str, mx.array]) -> format.Weights:
    """Write lazy arrays, each evaluated, checked and let go in its turn.

    `arrays` is emptied on the way: what it still held would stay in memory.
    """

    def entry(key: str) -> Tensor:
        shape, dtype = tuple(arrays[key].shape), arrays[key].dtype

        def chunks() -> Iterator[memoryview]:
            array = finite(key, arrays.pop(key))
            yield np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).data

        return Tensor(str(dtype).removeprefix("mlx.core."), shape, chunks)

    tensors = {key: entry(key) for key in sorted(arrays)}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    sha256 = write_safetensors(path, tensors)
    return format.Weights(path.name, sha256, nbytes)


def copy_config(source: Source, folder: Path, changes: dict) -> None:
    """Copy configuration and tokenizer; config.json gets `changes`."""
    for pattern in CONFIG_FILES:
        for file in source.folder.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
    config = json.loads((source.folder / "config.json").read_text()) | changes
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def quantize_modules(model: nn.Module, but: Collection[str], quantize: dict) -> int:
    """Quantise all that can be, as mlx-lm's own `convert` would.

    Args:
        model: Changed in place; nothing is evaluated.
        but: Paths of modules to leave as they are, with all below them.
        quantize: `group_size`, `bits` and `mode`.

    Returns:
        How many modules it was.
    """
    changed = 0
    theirs = getattr(model, "quant_predicate", None) or (lambda path, module: True)

    def wanted(path: str, module: nn.Module) -> bool | dict:
        nonlocal changed
        if (
            not hasattr(module, "to_quantized")
            or any(f"{path}.".startswith(f"{name}.") for name in but)
            or module.weight.shape[-1] % quantize["group_size"]
        ):
            return False
        say = theirs(path, module)
        changed += bool(say)
        return say

    nn.quantize(model, **quantize, class_predicate=wanted)
    return changed


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


def packing_config(packed: dict[str, dict]) -> dict:
    """What config.json must say of quantised modules: each, by its path."""
    if not packed:
        return {}
    return {"quantization": next(iter(packed.values())) | packed}


def write_manifest(work: WorkFolder, source: Source, **facts) -> None:
    """Write flash.json, the last file, and hold it against what was written."""
    local = Path(source.name)
    manifest = format.Manifest(
        format_version=format.FORMAT_VERSION,
        # A path would say more about this machine than about the model.
        source=local.resolve().name if local.exists() else source.name,
        revision=source.revision,
        model_type=source.config["model_type"],
        layers=tuple(format.layer_from_json(entry) for entry in work.layers),
        **facts,
    )
    (work.folder / format.MANIFEST).write_text(manifest.to_json())
    format.check_manifest(manifest, work.folder)
