"""`mlx-flash learn`: learn from text which experts come next."""

from pathlib import Path

import click

from .common import chosen_model, run_options
from .text_file import read_text


@click.command()
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Text like what the model will read and write.  [default: sampled from it]",
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=16384,
    show_default=True,
    help="How much of it.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to write.  [default: mlx-flash's cache folder, where every command "
    "finds it]",
)
@run_options
@click.option("--quiet", "-q", is_flag=True, help="No progress bars.")
def learn(text, tokens, output, model, memory, quiet):
    """Learn which experts come next, to keep and to read these.

    Runs then keep the experts that are wanted soon, and read early what the next layer
    will choose. It never changes what a model answers.

    \b
    Examples:
      mlx-flash learn --model ./qwen3-30b-a3b-4bit --text notes.txt
      mlx-flash learn --model demo-moe --tokens 4096
    """
    from ..checkpoints.foresight_file import learned_path, write_foresight
    from ..learning import learn as run
    from ..learning import sampled_pieces, text_pieces
    from ..library.by_name import load
    from ..tracing import PIECE_TOKENS

    words = None if text is None else read_text(text)
    folder, memory = chosen_model(model, memory)
    shown = False if quiet else None
    with load(folder, memory, context=PIECE_TOKENS, look_ahead=False) as (
        network,
        tokenizer,
    ):
        if words is None:
            pieces = sampled_pieces(network, tokenizer, tokens, shown)
        else:
            pieces = text_pieces(tokenizer, words, tokens)
        learned, facts = run(network, pieces, shown)
        path = output or learned_path(folder)
        write_foresight(path, network.flash.manifest, learned, facts)
    click.echo(
        f"{path}: of the experts of the next layer, {_mean(facts['recall'])} are "
        f"guessed, and {_mean(facts['precision'])} of the guesses are right "
        f"({facts['tokens']:,} tokens, the last fifth held out).",
        err=True,
    )


def _mean(shares: list[float]) -> str:
    return f"{sum(shares) / max(len(shares), 1):.0%}"
