"""`mlx-flash trace`: record which units a run asks for."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import FlashError
from .common import DEMO_MEMORY, DEMO_MODEL, Memory


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Read this text token by token, instead of continuing PROMPT.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.npz",
    help="Where to write.",
)
@click.option(
    "--model", default=None, metavar="FOLDER", help="As `generate`.  [default: demo]"
)
@click.option("--memory", type=Memory(), default=None, help="As `generate`.")
@click.option(
    "--max-tokens",
    "-m",
    type=click.IntRange(2),
    default=None,
    help="New tokens, or tokens of the text.  [default: 100; of a text 1024]",
)
@click.option(
    "--temp",
    type=click.FloatRange(0),
    default=0.7,
    show_default=True,
    help="Sampling temperature.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    show_default=True,
    help="Seed of the sampling.",
)
def trace(prompt, text, output, model, memory, max_tokens, temp, seed):
    """Record the neurons or experts that a run asks for, for `replay`.

    \b
    Examples:
      mlx-flash trace "Once upon a time" -o story.npz
      mlx-flash trace --text notes.txt --model opt-6.7b-flash --memory 7GB -o notes.npz
    """
    if (prompt is None) == (text is None):
        raise click.UsageError("Give either a PROMPT or --text FILE.")
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    from ..assembly import can_stream
    from ..checkpoints.hub import find_model
    from ..generation import context_for, encode_prompt
    from ..loading import load_model, load_tokenizer
    from ..tracing import PIECE_TOKENS, record_prompt, record_text

    text = _read(text) if text else None
    max_tokens = max_tokens or (1024 if text else 100)
    folder = find_model(model, checkpoint=can_stream) if model else DEMO_MODEL
    tokenizer = load_tokenizer(folder)
    tokens = None if text else encode_prompt(tokenizer, prompt)
    loaded = load_model(
        folder,
        memory or ("auto" if model else DEMO_MEMORY),
        context=PIECE_TOKENS if text else context_for(folder, len(tokens), max_tokens),
    )
    with loaded as (network, _):
        if text:
            recorded = record_text(network, tokenizer, text, max_tokens)
        else:
            mx.random.seed(seed)
            recorded = record_prompt(
                network, tokenizer, tokens, max_tokens, sampler=make_sampler(temp)
            )
    recorded.save(output)
    steps = len(recorded.tokens[0]) - recorded.warm[0]
    click.echo(
        f"{output}: {steps} steps after {recorded.warm[0]} of the prompt, "
        f"{len(recorded.units)} layers of {recorded.unit}s, "
        f"{output.stat().st_size / 1e6:.2f} MB",
        err=True,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FlashError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise FlashError(
            f"{path} is not text in UTF-8. Convert it first, with iconv for example."
        ) from error
