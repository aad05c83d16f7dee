"""Which classes build a model: ours where we have a file for it, else mlx-lm's."""

import importlib
from typing import Any

from ..errors import FlashError
from .rope import reading_older_names

OWN = ("opt", "falcon", "persimmon")


def get_model_classes(config: dict) -> tuple[type[Any], type[Any]]:
    """(Model, ModelArgs) for a config: ours where we have one, else mlx-lm's.

    The signature is what `mlx_lm.utils.load_model(get_model_classes=…)` calls.

    Raises:
        FlashError: If no such model is known, naming ours.
    """
    model_class, args_class = _classes(config)
    return model_class, reading_older_names(args_class)


def _classes(config: dict) -> tuple[type[Any], type[Any]]:
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
