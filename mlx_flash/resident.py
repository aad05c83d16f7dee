"""Read the weights that stay in memory."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from .arrays import parameters
from .errors import FlashError, reason_of
from .progress import Bar

STEP_BYTES = 64_000_000  # read between two looks at the bar


def read_weights(model: nn.Module, folder: Path, bar: Bar | None = None) -> None:
    """Read all weights of `model` that are lazy, which lie in `folder`.

    Raises:
        FlashError: If they cannot be read.
    """
    step: list[mx.array] = []
    for array in parameters(model).values():
        step.append(array)
        if sum(x.nbytes for x in step) >= STEP_BYTES:
            _read(step, folder, bar)
            step.clear()
    _read(step, folder, bar)


def _read(arrays: list[mx.array], folder: Path, bar: Bar | None) -> None:
    try:
        mx.eval(arrays)
    except RuntimeError as error:
        raise FlashError(
            f"The weights of {folder} cannot be read: {reason_of(error)}. Check the "
            "disk, then download or convert the model again."
        ) from error
    if bar is not None:
        bar.advance(sum(array.nbytes for array in arrays))
