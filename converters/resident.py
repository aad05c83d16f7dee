"""What a flash folder holds besides bundles: whole weights and the config."""

import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..arrays import parameters
from ..checkpoints.hub import CONFIG_FILES
from ..errors import FlashError
from ..models.registry import get_model_classes
from ..models.rope import with_older_names
from ..storage.digests import sample_sha256
from ..storage.layout import dtype_name
from ..storage.manifest import Weights
from ..storage.safetensors import Tensor, write_safetensors
from .arrays import finite
from .source import Source


def check_names(source: Source, model: nn.Module) -> None:
    """Refuse tensors that are missing, unknown or misshapen, naming the first."""
    want = {name: w.shape for name, w in parameters(model).items()}
    have = {name: w.shape for name, w in source.weights().items()}
    for names, what in (
        (want.keys() - have.keys(), "lacks"),
        (have.keys() - want.keys(), "has weights this model type does not know:"),
        ({n for n in want.keys() & have.keys() if want[n] != have[n]}, "has misshapen"),
    ):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise FlashError(f"The checkpoint {source.name} {what} {some}.")


def write_weights(path: Path, arrays: dict[str, mx.array]) -> Weights:
    """Write lazy arrays, each evaluated, checked and let go in its turn.

    `arrays` is emptied on the way: what it still held would stay in memory.
    """

    def entry(key: str) -> Tensor:
        shape, dtype = tuple(arrays[key].shape), arrays[key].dtype

        def chunks() -> Iterator[memoryview]:
            array = finite(key, arrays.pop(key))
            yield np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).data

        return Tensor(dtype_name(dtype), shape, chunks)

    tensors = {key: entry(key) for key in sorted(arrays)}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    sha256 = write_safetensors(path, tensors)
    return Weights(path.name, sha256, nbytes, sample_sha256(path))


def copy_config(source: Source, folder: Path, changes: dict) -> None:
    """Copy configuration and tokenizer; config.json gets `changes`.

    It also gets the older names of what transformers 5 writes otherwise, so that mlx-lm
    reads it as we do.
    """
    for pattern in CONFIG_FILES:
        for file in source.folder.glob(pattern):
            if file.is_file() and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
    config = json.loads((source.folder / "config.json").read_text())
    _, args_class = get_model_classes(config)
    config = with_older_names(config, args_class) | changes
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def quantize_modules(model: nn.Module, but: Collection[str], quantize: dict) -> None:
    """Quantise all that can be, as mlx-lm's own `convert` would.

    Args:
        model: Changed in place; nothing is evaluated.
        but: Paths of modules to leave as they are, with all below them.
        quantize: `group_size`, `bits` and `mode`.
    """
    theirs = getattr(model, "quant_predicate", None) or (lambda path, module: True)

    def wanted(path: str, module: nn.Module) -> bool | dict:
        if (
            not hasattr(module, "to_quantized")
            or any(f"{path}.".startswith(f"{name}.") for name in but)
            or module.weight.shape[-1] % quantize["group_size"]
        ):
            return False
        return theirs(path, module)

    nn.quantize(model, **quantize, class_predicate=wanted)
