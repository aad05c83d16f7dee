"""`mlx_flash.load` and `load_model`: of any name, converting where that is wanted."""

from pathlib import Path
from typing import Unpack

from .. import loading
from ..flash import Loaded
from ..load_options import LoadKeywords
from .opening import converted, runnable


def load(
    path: str | Path,
    memory: int | float | str = "auto",
    trust_remote_code: bool = False,
    convert: bool = False,
    **options: Unpack[LoadKeywords],
) -> Loaded:
    """Load a model and its tokenizer.

    >>> with mlx_flash.load("opt-6.7b-flash", memory="7GB") as (model, tokenizer):
    ...     print(mlx_lm.generate(model, tokenizer, "Once upon a time"))

    Args:
        path: A flash folder, a checkpoint with experts, a hub name of one, or the
            name of anything that was converted before (`mlx-flash list`).
        memory: All that the model may hold: bytes, "7GB", "50%" of it or 0.5, or
            "auto".
        trust_remote_code: Whether the tokenizer may be code that the folder brings.
        convert: Whether a checkpoint that does not run as it lies is converted into
            mlx-flash's own folder, which takes as much disk again.
        options: `context=8192`, `policy="lru"` and so on: see `mlx_flash.LoadOptions`.

    Returns:
        (model, tokenizer), a tuple that is also a context manager.

    Raises:
        FlashError: As `load_model`, and if the folder has no tokenizer, or another
            model's.
    """
    loading.follow_rank_0()
    found = _find(path, convert)
    return loading.load(found, memory, trust_remote_code, **options)


def load_model(
    path: str | Path,
    memory: int | float | str = "auto",
    convert: bool = False,
    **options: Unpack[LoadKeywords],
) -> Loaded:
    """Load a model without its tokenizer.

    Args:
        path, memory, convert: As for `load`.
        options: `context=8192`, `policy="lru"` and so on: see `mlx_flash.LoadOptions`.

    Returns:
        (model, config); `model.flash` is a `Flash`.

    Raises:
        FlashError: If the model is missing, damaged, altered or newer, has to be
            converted first, or does not fit.
    """
    loading.follow_rank_0()
    return loading.load_model(_find(path, convert), memory, **options)


def _find(path: str | Path, convert: bool) -> str | Path:
    if convert:
        return runnable(path, lambda offer: True)
    return converted(path) or path
