"""Models that mlx-lm lacks, in its own style; all others are mlx-lm's."""

from __future__ import annotations

import importlib
from pathlib import Path

from ..errors import FlashError

OWN = ("opt",)


def get_model_classes(config: dict) -> tuple[type, type]:
    """(Model, ModelArgs) for a config: ours by `model_type`.

    The signature is what `mlx_lm.utils.load_model(get_model_classes=…)` calls.

    Raises:
        FlashError: If no such model is known, naming those that are.
    """
    model_type = config.get("model_type")
    if model_type not in OWN:
        raise FlashError(
            f"Model type {model_type!r} is not supported. Supported: {', '.join(OWN)}."
        )
    module = importlib.import_module(f".{model_type}", __package__)
    return module.Model, module.ModelArgs


def read_config(folder: Path) -> dict:
    """config.json (with generation_config's end tokens), as mlx-lm reads it."""
    from mlx_lm.utils import load_config

    try:
        config = load_config(folder)
    except FileNotFoundError:
        raise FlashError(
            f"{folder} has no config.json: it is no model folder."
        ) from None
    except (OSError, ValueError) as error:
        raise FlashError(
            f"{folder / 'config.json'} cannot be read: {error}."
        ) from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise FlashError(f"{folder / 'config.json'} names no model_type.")
    return config
