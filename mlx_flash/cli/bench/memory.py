"""How speed depends on memory, and whether memory is kept."""

from __future__ import annotations

import click

from ..common import DEMO_MODEL, Memory
from .options import (
    PATH,
    count,
    folder_option,
    make_shape,
    reported,
    scratch,
)


@click.command()
@click.option(
    "--model",
    type=PATH,
    default=DEMO_MODEL,
    show_default="the demo model",
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
@count("--prompt-tokens", 32)
@count("--repeats", 2)
@reported(plot=True)
def sweep(model, budgets, **options):
    """Tokens/s, bytes per token and hit rate over memory budgets.

    \b
    Examples:
      mlx-flash bench sweep --plot sweep.png
      mlx-flash bench sweep --model opt-6.7b-flash --memory 7GB --memory 9GB
    """
    from ...bench import sweep

    return sweep.run(model, budgets, **options)


@click.command()
@count("--dims", 2048, "Model width.")
@count("--ffn", 8192, "Neurons of a layer.")
@count("--layers", 24)
@click.option("--vocab", type=click.IntRange(8), default=50272, show_default=True)
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    multiple=True,
    default=["float16"],
    show_default=True,
    help="To convert to; the last one generates (MLX on a CPU is slow in float16).",
)
@count("--calibration-tokens", 1024)
@click.option("--rank", type=int, help="Of predictors.  [default: the converter's]")
@count("--fit-steps", 400, "Of a predictor; memory does not depend on it.")
@click.option(
    "--memory",
    "budgets",
    multiple=True,
    default=["least", "30%", "50%", "100%"],
    show_default=True,
    help="A budget, or the least that works; repeat it for more.",
)
@count("--prompt", 32, "Tokens.")
@count("--tokens", 32, "With a predictor.")
@count("--exact-tokens", 3, "Without one.")
@click.option("--long", default=200, show_default=True, help="To look for leaks.")
@folder_option
@reported(plot=False)
def memory(dims, ffn, layers, vocab, folder, **options):
    """What processes that convert and generate hold, against what was promised.

    \b
    Examples:
      mlx-flash bench memory --dtype float16 --dtype float32 --fit-steps 12
      mlx-flash bench memory --dims 256 --ffn 2048 --layers 2 --vocab 2048
    """
    from ...bench import memory

    shape = make_shape(layers, dims, ffn, vocab, "float16")
    with scratch(folder) as place:
        return memory.run(place, shape, memory.Options(**options))


@click.command()
@folder_option
@count("--layers", 48)
@click.option("--memory", type=Memory(), default="6GB", show_default=True)
@count("--prompt-tokens", 16)
@count("--tokens", 8)
@click.option("--convert", "converted", is_flag=True, help="Converted, too.")
@reported(plot=True)
def moe(folder, **options):
    """A mixture of experts larger than its memory, of Qwen3-30B-A3B's shape.

    \b
    Examples:
      mlx-flash bench moe --convert
      mlx-flash bench moe --layers 4 --memory 600MB
    """
    from ...bench import moe

    with scratch(folder) as place:
        return moe.run(place, **options)
