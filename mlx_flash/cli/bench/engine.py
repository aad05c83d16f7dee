"""Parts of the engine: the reader, the order on flash, overlap, its own cost."""

from __future__ import annotations

import click

from ..common import DEMO_MODEL, Memory
from .options import (
    PATH,
    SHARE,
    TEXT,
    count,
    folder_option,
    make_shape,
    model_or_opt,
    parse_shape,
    reported,
)

VOCABULARY = 2048  # of models whose embeddings do not matter


@click.command()
@count("--layers", 32)
@count("--units", 16384, "Neurons of a layer.")
@count("--dims", 4096, "Model width.")
@click.option("--reader", type=click.Choice(["c", "python", "both"]), default="both")
@click.option(
    "--window", "windows", multiple=True, type=int, help="Add a row: window policy."
)
@count("--tokens", 96, "Measured, per row.")
@count("--rounds", 4, "Blocks of those tokens.")
@count("--warm-up", 24, "Tokens before them.")
@click.option(
    "--selected", type=SHARE, default=0.10, show_default=True, help="Share, per token."
)
@click.option(
    "--resident", type=SHARE, default=0.24, show_default=True, help="Share in slots."
)
@click.option(
    "--missing", type=SHARE, default=0.024, show_default=True, help="Share read, LRU."
)
@click.option("--fio-seconds", default=4.0, show_default=True, help="0 leaves it out.")
@folder_option
@reported(plot=False)
def reader(layers, units, dims, folder, reader, windows, fio_seconds, **options):
    """Reader and slot cache on OPT-6.7B's bundles, beside fio.

    \b
    Examples:
      mlx-flash bench reader --window 4
      mlx-flash bench reader --layers 4 --units 2048 --dims 512 --fio-seconds 0
    """
    from ...bench import methods
    from ...bench import reader as measured

    shape = make_shape(layers, dims, units, VOCABULARY, "float16")
    with model_or_opt(None, folder, shape) as path:
        return measured.run(
            path, methods.Options(**options), reader, windows, fio_seconds
        )


@click.command()
@click.argument("text", type=TEXT)
@click.option(
    "--place-text",
    type=TEXT,
    help="Text to place by.  [default: the first half of TEXT]",
)
@click.option("--model", type=PATH, default=DEMO_MODEL, show_default="the demo model")
@click.option("--memory", type=Memory(), default="50%", show_default=True)
@count("--tokens", 1024, "Played.")
@count("--place-tokens", 8192, "Placed by.")
@click.option("--policy", type=click.Choice(["lru", "lrfu"]), default="lru")
@count("--rounds", 8, "Blocks of the tokens.")
@reported(plot=False)
def placement(text, place_text, model, **options):
    """Orders of a model's neurons on flash, played with TEXT at equal memory.

    \b
    Example:
      mlx-flash bench placement valid.txt --place-text train.txt
    """
    from ...bench import placement

    return placement.run(text, place_text, model, placement.Options(**options))


@click.command()
@click.option("--model", type=PATH, help="Flash folder.  [default: a synthetic OPT]")
@click.option(
    "--shape", default="8x2048x8192", show_default=True, metavar="LAYERSxDIMSxFFN"
)
@click.option("--memory", type=Memory(), default="50%", show_default=True)
@count("--tokens", 96)
@reported(plot=True)
def overlap(model, shape, memory, tokens):
    """Reading while MLX computes, and reading early, beside doing it in turn."""
    from ...bench import overlap

    wanted = parse_shape(shape, VOCABULARY, "float32")
    with model_or_opt(model, None, wanted, memory) as path:
        return overlap.run(path, memory, tokens)


@click.command()
@click.option("--tokens", type=click.IntRange(12), default=120, show_default=True)
@reported(plot=False)
def whole(tokens):
    """What the engine costs where everything fits in memory, beside mlx-lm."""
    from ...bench import whole

    return whole.run(tokens)
