"""A mixture of experts as it is published, beside the same one as mlx-lm saves it.

Unquantised, and with a tensor for each expert and projection. MLX's CPU backend gathers
matrices of float32 alone: a dimension of the experts is half as long, so that a tensor
has as many bytes as one of 16 bits.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..storage.layout import dtype_name
from ..storage.safetensors import Tensor, write_safetensors
from .synthetic import weight, write_checkpoint

Arrays = dict[str, mx.array]


def checkpoints(
    place: Path, config: dict, factor: Callable[[str], float]
) -> dict[str, Path]:
    """Both checkpoints, by what they are called in the report; written if need be.

    Args:
        config: Of a Qwen3-MoE; the checkpoints have other sizes of experts.
        factor: How much wider than others the weights of a name are spread.
    """
    config = {k: v for k, v in config.items() if k != "quantization"}
    config["moe_intermediate_size"] //= 2

    def floats(name: str, shape: tuple[int, ...]) -> Arrays:
        if len(shape) == 1:
            return {name: mx.ones(shape)}
        return {name: weight(name, shape, "float32") * factor(name)}

    def one_by_one(name: str, shape: tuple[int, ...]) -> Arrays:
        made = floats(name, shape)
        if "switch_mlp." not in name:
            return made
        return {
            name.replace("switch_mlp.", f"experts.{i}."): one
            for i, one in enumerate(made[name])
        }

    folders = {}
    for title, folder, make in (
        ("as published", place / "moe-published", one_by_one),
        ("in place", place / "moe-float32", floats),
    ):
        folders[title] = folder
        if not folder.exists():
            write_checkpoint(folder, config, make, save_sorted)
    return folders


def save_sorted(path: Path, arrays: Arrays) -> None:
    """Write a shard in the order of names, as published ones are.

    MLX's own order is that of a hash table.
    """
    tensors = {
        name: Tensor(dtype_name(array.dtype), array.shape, partial(_bytes, array))
        for name, array in sorted(arrays.items())
    }
    write_safetensors(path, tensors)


def _bytes(array: mx.array) -> list[memoryview]:
    return [np.asarray(mx.contiguous(array).reshape(-1).view(mx.uint8)).data]
