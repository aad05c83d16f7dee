"""`mlx-flash bench`: measure this machine, and compare with the paper and with peers.

Tables go to stdout as Markdown; `--json` keeps everything that was measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from .common import DEMO_MODEL, Memory


@click.group()
def bench():
    """Measure what running from flash costs on this machine."""


def report_options(plot: bool = True):
    """--json and --plot, which every benchmark has."""
    path = click.Path(dir_okay=False, writable=True, path_type=Path)

    def add(command):
        if plot:
            command = click.option(
                "--plot", type=path, metavar="FILE", help="Draw it as PNG (matplotlib)."
            )(command)
        return click.option(
            "--json", "as_json", type=path, metavar="FILE", help="Write a report."
        )(command)

    return add


def shape_options(dtype: str):
    """Sizes of the synthetic model, and where it is written."""
    options = [
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
        click.option(
            "--folder",
            type=click.Path(file_okay=False, path_type=Path),
            metavar="FOLDER",
            help="Write it here and keep it.  [default: deleted at the end]",
        ),
    ]

    def add(command):
        for option in reversed(options):
            command = option(command)
        return command

    return add


def parse_shape(shape: str, vocab: int, dtype: str):
    """A `synthetic.Shape` of LAYERSxDIMSxFFN."""
    from ..bench.synthetic import Shape

    try:
        layers, dims, units = (int(n) for n in shape.lower().split("x"))
        heads = max(dims // 128, 1)
        if min(layers, dims, units) < 1 or dims % heads:
            raise ValueError
    except ValueError:
        raise click.BadParameter(
            f"{shape!r} is no shape. Try 32x4096x16384.", param_hint="--shape"
        ) from None
    return Shape(layers, dims, units, heads, vocab, dtype=dtype)


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """`folder`, or one beside the user that is deleted at the end in every case."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mlx-flash-bench-", dir=".") as made:
        yield Path(made)


def show(report, as_json: Path | None, plot: Path | None = None) -> None:
    """Print the table and write what else was asked for."""
    click.echo(report.markdown())
    if as_json:
        report.write(as_json)
        click.echo(f"{as_json} has the report.", err=True)
    if plot:
        from ..bench.plots import draw

        draw(report, plot)
        click.echo(f"{plot} has the plot.", err=True)


@bench.command()
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Flash folder.  [default: a synthetic OPT]",
)
@shape_options("float16")
@click.option("--tokens", type=click.IntRange(1), default=96, show_default=True)
@click.option(
    "--dense-tokens",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Of naive and hybrid, which read gigabytes for each.",
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--window", type=click.IntRange(1), default=4, show_default=True)
@report_options()
def table2(model, shape, vocab, dtype, folder, as_json, plot, **options):
    """The I/O of a token: naive, hybrid, predictor, windowing, bundling.

    Reads for real, through the reader that generation uses; which neurons a token
    needs is a synthetic trace with the paper's statistics.

    \b
    Examples:
      mlx-flash bench table2 --json table2.json
      mlx-flash bench table2 --shape 4x512x2048 --tokens 12
    """
    from ..bench import synthetic, table2

    wanted = parse_shape(shape, vocab, dtype)
    with scratch(folder) if model is None else scratch(Path(".")) as place:
        folder = model or synthetic.flash_folder(place, wanted)
        report = table2.run(folder, table2.Options(**options))
    show(report, as_json, plot)


@bench.command()
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    default=DEMO_MODEL,
    show_default="the demo model",
    metavar="FOLDER",
    help="Flash folder, or an mlx-lm checkpoint with experts.",
)
@click.option(
    "--memory",
    "budgets",
    type=Memory(),
    multiple=True,
    default=("40%", "50%", "60%", "70%", "80%", "90%", "100%"),
    show_default="40% to 100% in tenths",
    help="A budget; repeat it for more.",
)
@click.option("--tokens", type=click.IntRange(2), default=32, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(1), default=32, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=2, show_default=True)
@report_options()
def sweep(model, budgets, as_json, plot, **options):
    """Tokens/s, bytes per token and hit rate over memory budgets.

    \b
    Examples:
      mlx-flash bench sweep --plot sweep.png
      mlx-flash bench sweep --model opt-6.7b-flash --memory 7GB --memory 9GB
    """
    from ..bench import sweep

    show(sweep.run(model, budgets, **options), as_json, plot)


@bench.command()
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Flash folder with predictors.  [default: a synthetic OPT]",
)
@shape_options("float32")
@click.option("--memory", type=Memory(), default="50%", show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option(
    "--dense-tokens",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Of naive and hybrid, which read gigabytes for each.",
)
@report_options()
def table3(model, shape, vocab, dtype, folder, memory, as_json, plot, **options):
    """A token end to end: naive, hybrid and all of the method.

    The default writes and reads a model of 27 GB in 32 bit, because MLX computes on a
    CPU many times slower in 16.

    \b
    Examples:
      mlx-flash bench table3 --json table3.json
      mlx-flash bench table3 --shape 8x1024x4096 --tokens 64
    """
    from ..bench import synthetic, table3

    wanted = parse_shape(shape, vocab, dtype)
    with scratch(folder) if model is None else scratch(Path(".")) as place:
        folder = model or synthetic.flash_folder(place, wanted, memory)
        report = table3.run(folder, memory, **options)
    show(report, as_json, plot)


@bench.command()
@shape_options("float32")
@click.option("--memory", type=Memory(), default="50%", show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(1), default=16, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=32, show_default=True)
@click.option(
    "--slow-tokens",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Of programs that read gigabytes for each.",
)
@click.option("--ballast/--no-ballast", default=True, help="Limit memory.  [default]")
@click.option("--keep", is_flag=True, help="Keep every file, with --folder.")
@click.option(
    "--only",
    type=click.Choice(["mlx_flash", "mlx_lm", "llama_cpp", "accelerate"]),
    multiple=True,
    help="Run this program; repeat it for more.  [default: all]",
)
@report_options()
def peers(shape, vocab, dtype, folder, as_json, plot, **options):
    """mlx-flash beside mlx-lm, llama.cpp and accelerate, with the same memory.

    All run the same random weights, one program after the other, in what memory a
    ballast leaves free. Programs that are not installed are left out.

    \b
    Examples:
      mlx-flash bench peers --json peers.json
      mlx-flash bench peers --shape 16x2048x8192 --memory 50% --tokens 16
    """
    from ..bench import peers

    wanted = parse_shape(shape, vocab, dtype)
    with scratch(folder) as place:
        report = peers.run(place, wanted, peers.Options(**options))
    show(report, as_json, plot)
