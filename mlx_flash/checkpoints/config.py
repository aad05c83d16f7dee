"""config.json, and the model without weights that it describes."""

from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..errors import FlashError
from ..models.registry import OWN

# What no config.json of these leaves out, by the names mlx-lm uses.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


def read_config(folder: Path) -> dict:
    """config.json (with generation_config's end tokens), as mlx-lm reads it."""
    from mlx_lm.utils import load_config

    try:
        config = load_config(folder)
    except FileNotFoundError:
        raise FlashError(
            f"{folder} has no config.json: it is no model folder."
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FlashError(
            f"{folder / 'config.json'} (or generation_config.json beside it) cannot be "
            f"read: {error}."
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise FlashError(f"{folder / 'config.json'} names no model_type.")
    return config


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
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0]
        raise FlashError(f"{path} describes no possible model: {reason}") from error
