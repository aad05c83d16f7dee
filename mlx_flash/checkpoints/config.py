"""config.json, and the model without weights that it describes."""

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..errors import FlashError, reason_of
from ..models.registry import OWN
from ..storage.files import file_bytes, read_json

# What no config.json of these leaves out, by the names mlx-lm uses.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
# What mlx-lm and transformers read of a folder besides weights.
CONFIG_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
TEMPLATES = "additional_chat_templates"
# Names of dimensions and of counts, which build one module each.
DIMENSIONS = re.compile(r"size|dim|rank|heads|^d_|^max_pos|^n_|^num_")
COUNTS = re.compile(r"layers?$|experts$|blocks?$|groups?$")
MAX_DIMENSION = 2**31 - 1  # MLX counts in int32
MAX_COUNT = 10_000  # forty times what any published model has


def read_config(folder: Path) -> dict:
    """config.json (with generation_config's end tokens), as mlx-lm reads it."""
    from mlx_lm.utils import load_config

    path = folder / "config.json"
    _check_files(folder)
    try:
        read_json(path)  # which says what is wrong with it
        config = load_config(folder)
    except FileNotFoundError:
        raise FlashError(
            f"{folder} has no config.json: it is no model folder."
        ) from None
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise FlashError(
            f"{path} (or generation_config.json beside it) cannot be read: "
            f"{reason_of(error)}."
        ) from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    # transformers prints it as it is.
    if not isinstance(model_type, str) or not model_type.isprintable():
        raise FlashError(f"{path} names no model_type.")
    _check_sizes(config, path)
    return config


def _check_files(folder: Path) -> None:
    """Refuse pipes and devices, on which other libraries would wait without end."""
    for parent in (folder, folder / TEMPLATES):
        for name in os.listdir(parent) if parent.is_dir() else ():
            path = parent / name
            if any(fnmatch(name, p) for p in CONFIG_FILES) and path.exists():
                file_bytes(path)


def _check_sizes(config: dict, path: Path) -> None:
    """Refuse sizes with which building the model would take all memory, or fail."""
    for name, value in _numbers(config):
        most = MAX_COUNT if COUNTS.search(name) else MAX_DIMENSION
        if (COUNTS.search(name) or DIMENSIONS.search(name)) and value > most:
            raise FlashError(
                f"{path}: {name} cannot be {value!r}. Copy the original file again."
            )
    positions = config.get("max_position_embeddings")
    if positions is not None and (type(positions) is not int or positions < 1):
        raise FlashError(
            f"{path}: max_position_embeddings cannot be {positions!r}. Copy the "
            "original file again."
        )


def _numbers(config: dict) -> Iterator[tuple[str, int | float]]:
    """Every number in it with the name it has, in whatever object it lies."""
    left = [config]
    while left:
        for name, value in left.pop().items():
            if isinstance(value, dict):
                left.append(value)
            elif isinstance(value, int | float):
                yield name, value


def make_model(
    model_class: type[Any], args_class: type[Any], config: dict, folder: Path
) -> nn.Module:
    """The model, without weights, that the config found in `folder` describes.

    Raises:
        FlashError: If a size is missing, or no model can be built of them.
    """
    path = folder / "config.json"
    for name in SIZES if config.get("model_type") in OWN else ():
        value = config.get(name)
        if type(value) is not int or value < 1:
            found = "is missing" if value is None else f"cannot be {value!r}"
            raise FlashError(f"{path}: {name} {found}. Copy the original file again.")
    try:
        return model_class(args_class.from_dict(config))
    except Exception as error:  # each of mlx-lm's models fails in its own way
        raise FlashError(
            f"{path} describes no possible model: {reason_of(error)}"
        ) from error
