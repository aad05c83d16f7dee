"""What benchmarks are asked, as the types of the parameters of their `run`.

`mlx-flash bench` makes an option of each parameter, or an argument if it has no
default. An annotation may hold a click type, the help text, and a dictionary of
further settings of the option.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from ..errors import FlashError
from ..storage.skipping import MOST_SKIPPED

if TYPE_CHECKING:
    from ..library.opening import Offer
    from .opt import Shape


class MemoryType(click.ParamType):
    """7GB, 512MB, 50% or auto."""

    name = "SIZE|PERCENT|auto"

    def convert(self, value, param, ctx):
        from ..memory_size import parse_memory

        try:
            parse_memory(value)
        except FlashError as error:
            self.fail(str(error), param, ctx)
        return value


class ShareType(click.ParamType):
    """0.5 or 50%."""

    name = "SHARE"

    def convert(self, value, param, ctx):
        text = str(value).strip()
        try:
            share = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share <= MOST_SKIPPED:
            most = f"{MOST_SKIPPED:.0%}"
            self.fail(f"{text!r} cannot be skipped. Try 50%, or up to {most}.")
        return share


class ModelType(click.ParamType):
    """A model by any name that every command takes."""

    name = "NAME"

    def convert(self, value, param, ctx):
        from ..library.opening import runnable

        return runnable(value, _refuse)


def _refuse(offer: Offer) -> bool:
    raise FlashError(f"{offer} Do that first: mlx-flash convert {offer.name}")


FOLDER = click.Path(file_okay=False, path_type=Path)
TEXT = click.Path(exists=True, dir_okay=False, path_type=Path)

Count = Annotated[int, click.IntRange(1)]
Share = Annotated[float, click.FloatRange(0, 1)]
Memory = Annotated[str, MemoryType()]
Budgets = Annotated[tuple[str, ...], MemoryType()]
Text = Annotated[Path, TEXT]
Folder = Annotated[
    Path | None,
    FOLDER,
    "Write models here and keep them.  [default: deleted at the end]",
]
Model = Annotated[
    Path | None, ModelType(), "Any model's name.  [default: a synthetic OPT]"
]
DemoModel = Annotated[Path, ModelType(), {"show_default": "the demo model"}]
DTYPE = click.Choice(["float16", "bfloat16", "float32"])
OptDtype = Annotated[str, DTYPE, "Of its weights."]
OptShape = Annotated[
    str,
    "Of the synthetic OPT (the default is OPT-6.7B).",
    {"metavar": "LAYERSxDIMSxFFN"},
]
OptVocab = Annotated[int, click.IntRange(8), {"hidden": True}]
DenseTokens = Annotated[Count, "Of naive and hybrid, which read gigabytes for each."]
PageCache = Annotated[
    str,
    click.Choice(["auto", "on", "off"]),
    "Let the system cache what is read, or read the flash itself.",
]
OPT_6_7B = "32x4096x16384"
OPT_VOCAB = 50272
VOCABULARY = 2048  # of models whose embeddings do not matter


def make_shape(layers: int, dims: int, units: int, vocab: int, dtype: str) -> Shape:
    """A synthetic OPT with attention heads of 128 values each, as OPT-6.7B has them."""
    from .opt import Shape

    return Shape(layers, dims, units, max(dims // 128, 1), vocab, dtype=dtype)


def parse_shape(text: str, vocab: int, dtype: str) -> Shape:
    """The synthetic OPT that LAYERSxDIMSxFFN says."""
    try:
        layers, dims, units = (int(n) for n in text.lower().split("x"))
        shape = make_shape(layers, dims, units, vocab, dtype)
        if min(layers, dims, units) < 1 or dims % shape.heads:
            raise ValueError
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no shape. Try {OPT_6_7B}.", param_hint="--shape"
        ) from None
    return shape


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """`folder`, or one beside the user that is deleted at the end in every case."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mlx-flash-bench-", dir=".") as made:
        yield Path(made)


@contextmanager
def model_or_opt(
    model: Path | None, folder: Path | None, shape: Shape, memory: str | None = None
) -> Iterator[Path]:
    """The flash folder that was given, or a synthetic OPT's, with predictors for
    `memory` where that is given."""
    if model is not None:
        yield model
        return
    from .opt import flash_folder

    with scratch(folder) as place:
        yield flash_folder(place, shape, memory)
