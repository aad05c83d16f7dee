"""What several benchmarks are asked, and how all of them answer."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from ..common import plot_option

if TYPE_CHECKING:
    from ...bench.opt import Shape
    from ...bench.report import Report

Command = TypeVar("Command", bound=Callable)
PATH = click.Path(path_type=Path)
FILE = click.Path(dir_okay=False, writable=True, path_type=Path)
TEXT = click.Path(exists=True, dir_okay=False, path_type=Path)
COUNT = click.IntRange(1)
SHARE = click.FloatRange(0, 1)


def together(*options: Callable) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order they are to be listed."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def count(name: str, default: int, help: str | None = None) -> Callable:
    """An option of at least one."""
    return click.option(name, type=COUNT, default=default, show_default=True, help=help)


folder_option = click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write models here and keep them.  [default: deleted at the end]",
)


def shape_options(dtype: str) -> Callable[[Command], Command]:
    """Sizes of the synthetic OPT, and where it is written."""
    return together(
        click.option(
            "--shape",
            default="32x4096x16384",
            show_default=True,
            metavar="LAYERSxDIMSxFFN",
            help="Of the synthetic OPT (the default is OPT-6.7B).",
        ),
        click.option("--vocab", type=click.IntRange(8), default=50272, hidden=True),
        click.option(
            "--dtype",
            type=click.Choice(["float16", "bfloat16", "float32"]),
            default=dtype,
            show_default=True,
            help="Of its weights.",
        ),
        folder_option,
    )


def parse_shape(shape: str, vocab: int, dtype: str) -> Shape:
    """The sizes that LAYERSxDIMSxFFN says."""
    try:
        layers, dims, units = (int(n) for n in shape.lower().split("x"))
        if min(layers, dims, units) < 1 or dims % heads_of(dims):
            raise ValueError
    except ValueError:
        raise click.BadParameter(
            f"{shape!r} is no shape. Try 32x4096x16384.", param_hint="--shape"
        ) from None
    return make_shape(layers, dims, units, vocab, dtype)


def make_shape(layers: int, dims: int, units: int, vocab: int, dtype: str) -> Shape:
    from ...bench.opt import Shape

    return Shape(layers, dims, units, heads_of(dims), vocab, dtype=dtype)


def heads_of(dims: int) -> int:
    """Attention heads of 128 values each, as OPT-6.7B has them."""
    return max(dims // 128, 1)


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
    from ...bench.opt import flash_folder

    with scratch(folder) as place:
        yield flash_folder(place, shape, memory)


def reported(plot: bool) -> Callable[[Callable[..., Report]], Callable[..., None]]:
    """--json and --plot for a command that returns a report, which is printed."""

    def add(measure: Callable[..., Report]) -> Callable[..., None]:
        @functools.wraps(measure)
        def command(as_json: Path | None, plot: Path | None = None, **options) -> None:
            if plot:
                from ...bench.plots import check_plot, draw

                check_plot(plot)  # before anything is measured
            report = measure(**options)
            click.echo(report.markdown())
            if as_json:
                report.write(as_json)
                click.echo(f"{as_json} has the report.", err=True)
            if plot:
                draw(report, plot)
                click.echo(f"{plot} has the plot.", err=True)

        json_option = click.option(
            "--json", "as_json", type=FILE, help="Write a report."
        )
        if not plot:
            return json_option(command)
        return json_option(plot_option("the rows")(command))

    return add
