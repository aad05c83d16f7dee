"""Stock mlx-lm checkpoints: load one lazily, find where its tensors lie in its files.

mlx-lm's own loader builds the model, renames and quantises; arrays are not read until
they are evaluated. An expert tensor that reached the model as it came from the file can
be streamed from there. `origins.py` follows one that was stacked or split on the way.
"""

import contextlib
import glob
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import FlashError, reason_of
from ..models.registry import get_model_classes
from ..storage.layout import dtype_name
from ..storage.open_files import allow_open_files
from ..storage.safetensors import read_header
from .config import make_model, read_config
from .weight_format import main_dtype


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie."""

    file: Path
    offset: int
    bytes: int


@dataclass(frozen=True)
class Stock:
    """A checkpoint as mlx-lm loads it, nothing evaluated.

    Attributes:
        raw: The tensors as the files name them.
        made: What mlx-lm's `sanitize` made of these, under the model's names.
        places: Where each tensor of `raw` lies.
    """

    folder: Path
    model: nn.Module
    config: dict
    raw: dict[str, mx.array]
    made: dict[str, mx.array]
    places: dict[str, Place]

    def forget(self) -> None:
        """Let go of all tensors, which would keep whatever is evaluated of them."""
        self.raw.clear()
        self.made.clear()
        self._names.clear()

    def sanitizer(self) -> Callable[[dict[str, mx.array]], dict[str, mx.array]]:
        """What mlx-lm made `made` by, of a model of its own: this one may be packed."""
        config = read_config(self.folder)
        return make_model(*get_model_classes(config), config, self.folder).sanitize

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id(array): name for name, array in self.raw.items()}

    def tensor(self, array: mx.array) -> str | None:
        """The tensor that `array` is, None if mlx-lm made it out of what files hold."""
        return self._names.get(id(array))

    def dtype(self) -> str:
        """The dtype of most unquantised values: what the model computes in."""
        sizes = [(dtype_name(a.dtype), a.size) for a in self.raw.values()]
        return main_dtype(sizes, self.folder / "config.json")


def load_stock(folder: Path) -> Stock:
    """Load a checkpoint through mlx-lm without reading its weights.

    Raises:
        FlashError: If mlx-lm does not know the model type or the quantisation, or if
            tensors are missing or misshapen.
    """
    from mlx_lm.utils import load_model

    read_config(folder)
    # Before MLX loads them, which would read past the end of a cut file.
    places = _places(folder)
    allow_open_files(len({place.file for place in places.values()}))
    raw: dict[str, mx.array] = {}
    made: dict[str, mx.array] = {}

    def watched(config: dict) -> tuple[Any, type]:
        model_class, args_class = get_model_classes(config)

        def make(args: Any) -> nn.Module:
            model = model_class(args)
            inherited = getattr(model, "sanitize", lambda weights: weights)

            def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
                raw.update(weights)
                result = inherited(weights)
                made.update(result)
                return result

            model.sanitize = sanitize
            return model

        return make, args_class

    try:
        with _without_patterns(folder) as path:
            model, config = load_model(path, lazy=True, get_model_classes=watched)
    except FlashError:
        raise
    except FileNotFoundError:
        raise FlashError(f"{folder} has no weights (model*.safetensors).") from None
    except Exception as error:  # each of mlx-lm's models fails in its own way
        raise FlashError(
            f"mlx-lm cannot load {folder}: {reason_of(error)}. "
            "Check config.json and the checkpoint's shards, or update mlx-lm."
        ) from error
    del model.sanitize  # which holds the model: neither would go before a collection
    return Stock(folder, model, config, raw, made, places)


@contextlib.contextmanager
def _without_patterns(folder: Path) -> Iterator[Path]:
    """A path of the folder in which mlx-lm's `glob` sees no pattern.

    It would look for `model[1]` in the folder `model1`. MLX has the files open before
    the link goes.
    """
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as parent:
        link = Path(parent) / "model"
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield link


def _places(folder: Path) -> dict[str, Place]:
    """Every tensor's place, from the headers of the shards."""
    places = {}
    for file in sorted(folder.glob("model*.safetensors")):
        header, start = read_header(file)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            places[name] = Place(file, start + first, last - first)
    return places
