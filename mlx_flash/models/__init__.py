"""Models that mlx-lm lacks, in its own style; all others are mlx-lm's."""

from __future__ import annotations

import importlib
from pathlib import Path

from ..errors import FlashError

OWN = ("opt", "falcon", "persimmon")
# What no config.json of these leaves out, by the names mlx-lm uses.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


def get_model_classes(config: dict) -> tuple[type, type]:
    """(Model, ModelArgs) for a config: ours where we have one, else mlx-lm's.

    The signature is what `mlx_lm.utils.load_model(get_model_classes=…)` calls.

    Raises:
        FlashError: If no such model is known, naming ours.
    """
    from .relu_llama import is_relu_llama

    model_type = config.get("model_type")
    name = "relu_llama" if is_relu_llama(config) else model_type
    if name in (*OWN, "relu_llama"):
        module = importlib.import_module(f".{name}", __package__)
        return module.Model, module.ModelArgs
    from mlx_lm.utils import _get_classes  # what its load_model uses by default

    try:
        return _get_classes(config)
    except ValueError:
        raise FlashError(
            f"Model type {model_type!r} is not supported. Supported: {', '.join(OWN)}, "
            "and the mixture-of-experts models of the installed mlx-lm."
        ) from None


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


def make_model(model_class: type, args_class: type, config: dict, folder: Path):
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
