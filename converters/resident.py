"""What a flash folder holds besides bundles: resident weights, predictors, config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .. import format
from ..errors import FlashError
from ..hub import CONFIG_FILES
from ..safetensors_io import DTYPES, Tensor, write_safetensors
from .source import Source, finite


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


def write_weights(
    path: Path, arrays: dict[str, mx.array], dtype: mx.Dtype
) -> format.Weights:
    """Write lazy arrays in `dtype`, each evaluated, checked and let go in its turn.

    `arrays` is emptied on the way: what it still held would stay in memory.
    """
    name = str(dtype).removeprefix("mlx.core.")

    def entry(key: str) -> Tensor:
        def chunks() -> Iterator[memoryview]:
            array = finite(key, arrays.pop(key).astype(dtype))
            yield np.array(mx.contiguous(array).view(mx.uint8)).reshape(-1).data

        return Tensor(name, tuple(arrays[key].shape), chunks)

    tensors = {key: entry(key) for key in sorted(arrays)}
    nbytes = sum(prod(t.shape) for t in tensors.values()) * DTYPES[name][1]
    sha256 = write_safetensors(path, tensors)
    return format.Weights(path.name, sha256, nbytes)


def copy_config(source: Source, folder: Path, dtype: str) -> None:
    """Copy configuration and tokenizer; config.json gets the dtype that was written."""
    for pattern in CONFIG_FILES:
        for file in source.folder.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
    config = json.loads((source.folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
