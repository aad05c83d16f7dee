"""The paper's tables, here and in the cost model, and other programs beside."""

from __future__ import annotations

import click

from ..common import Memory
from .options import (
    PATH,
    count,
    model_or_opt,
    parse_shape,
    reported,
    scratch,
    shape_options,
)

MEMORY = click.option("--memory", type=Memory(), default="50%", show_default=True)
DENSE_HELP = "Of naive and hybrid, which read gigabytes for each."


@click.command()
@click.option("--model", type=PATH, help="Flash folder.  [default: a synthetic OPT]")
@shape_options("float16")
@count("--tokens", 96)
@count("--dense-tokens", 3, DENSE_HELP)
@count("--rounds", 3)
@count("--window", 4)
@reported(plot=True)
def table2(model, shape, vocab, dtype, folder, **options):
    """The I/O of a token: naive, hybrid, predictor, windowing, bundling.

    Reads for real, through the reader that generation uses; which neurons a token
    needs is SYNTHETIC, with the paper's statistics.

    \b
    Examples:
      mlx-flash bench table2 --json table2.json
      mlx-flash bench table2 --shape 4x512x2048 --tokens 12
    """
    from ...bench import table2

    with model_or_opt(model, folder, parse_shape(shape, vocab, dtype)) as path:
        return table2.run(path, table2.Options(**options))


@click.command()
@click.option(
    "--model",
    type=PATH,
    help="Flash folder with predictors.  [default: a synthetic OPT]",
)
@shape_options("float32")
@MEMORY
@count("--prompt-tokens", 128)
@count("--tokens", 256)
@count("--dense-tokens", 8, DENSE_HELP)
@reported(plot=True)
def table3(model, shape, vocab, dtype, folder, memory, **options):
    """A token end to end: naive, hybrid and all of the method.

    The default writes and reads a model of 27 GB in 32 bit, because MLX computes on a
    CPU many times slower in 16.

    \b
    Examples:
      mlx-flash bench table3 --json table3.json
      mlx-flash bench table3 --shape 8x1024x4096 --tokens 64
    """
    from ...bench import table3

    wanted = parse_shape(shape, vocab, dtype)
    with model_or_opt(model, folder, wanted, memory) as path:
        return table3.run(path, memory, **options)


@click.command()
@reported(plot=False)
def paper():
    """The paper's tables beside what the cost model makes of them.

    Nothing is measured: sizes and the shares of neurons that the paper counted go into
    the model of `mlx-flash plan`.
    """
    from ...bench import paper

    return paper.run()


@click.command()
@shape_options("float32")
@MEMORY
@count("--prompt-tokens", 16)
@count("--tokens", 32)
@count("--slow-tokens", 4, "Of programs that read gigabytes for each.")
@click.option("--ballast/--no-ballast", default=True, help="Limit memory.  [default]")
@click.option("--keep", is_flag=True, help="Keep every file, with --folder.")
@click.option(
    "--only",
    type=click.Choice(["mlx_flash", "mlx_lm", "llama_cpp", "accelerate"]),
    multiple=True,
    help="Run this program; repeat it for more.  [default: all]",
)
@reported(plot=True)
def peers(shape, vocab, dtype, folder, **options):
    """mlx-flash beside mlx-lm, llama.cpp and accelerate, with the same memory.

    All run the same random weights, one program after the other, in what memory a
    ballast leaves free. Programs that are not installed are left out.

    \b
    Examples:
      mlx-flash bench peers --json peers.json
      mlx-flash bench peers --shape 16x2048x8192 --memory 50% --tokens 16
    """
    from ...bench.peers import compare

    wanted = parse_shape(shape, vocab, dtype)
    with scratch(folder) as place:
        return compare.run(place, wanted, compare.Options(**options))
