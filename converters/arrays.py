"""Arrays of files and modules: list them, check them, let go of them."""

from collections.abc import Collection
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..arrays import parameters
from ..errors import FlashError


def load_arrays(path: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, unevaluated."""
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)  # files of one array have another suffix
    return arrays


def release(module: nn.Module, names: Collection[str] | None = None) -> None:
    """Let go of a module's arrays, or of those with `names`."""
    # Unevaluated zeros keep shapes and occupy nothing.
    zeros = [
        (name, mx.zeros(array.shape, array.dtype))
        for name, array in parameters(module).items()
        if names is None or name in names
    ]
    module.update(tree_unflatten(zeros))


def finite(name: str, array: mx.array) -> mx.array:
    """`array`, evaluated.

    Raises:
        FlashError: If it holds NaN or infinity, which no run could recover from.
    """
    if not mx.isfinite(array).all().item():
        # Only float16 has too small a range for weights that are sound.
        remedy = "The checkpoint is damaged: download it again."
        if array.dtype == mx.float16:
            remedy = (
                "Try --dtype bfloat16; if that fails too, the checkpoint is damaged."
            )
        raise FlashError(f"{name} holds NaN or infinite values. {remedy}")
    return array
