"""`mlx-flash trace`: record which units a run asks for."""

from pathlib import Path

import click

from .common import (
    check_option,
    chosen_model,
    page_cache_option,
    run_options,
    sampling_options,
)
from .text_file import read_text


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
@run_options
@click.option(
    "--max-tokens",
    "-m",
    type=click.IntRange(2),
    help="New tokens, or tokens of the text.  [default: 100; of a text 1024]",
)
@sampling_options(temp=0.7, seed=0)
@page_cache_option
@check_option
def trace(
    prompt, text, output, model, memory, max_tokens, temp, seed, page_cache, check
):
    """Record the neurons or experts that a run asks for, for `replay`.

    \b
    Examples:
      mlx-flash trace "Once upon a time" -o story.npz
      mlx-flash trace --text notes.txt --model opt-6.7b-flash --memory 7GB -o notes.npz
    """
    if (prompt is None) == (text is None):
        raise click.UsageError("Give either a PROMPT or --text FILE.")
    words = None if text is None else read_text(text)
    options = {"page_cache": page_cache, "check": check}
    recorded = _record(prompt, words, model, memory, max_tokens, temp, seed, options)
    recorded.save(output)
    steps = len(recorded.tokens[0]) - recorded.warm[0]
    click.echo(
        f"{output}: {steps} steps after {recorded.warm[0]} of the prompt, "
        f"{len(recorded.units)} layers of {recorded.unit}s, "
        f"{output.stat().st_size / 1e6:.2f} MB",
        err=True,
    )


def _record(prompt, words, model, memory, max_tokens, temp, seed, options):
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    from ..loading import load_model, load_tokenizer
    from ..prompts import context_for, encode_prompt
    from ..tracing import PIECE_TOKENS, record_prompt, record_text

    folder, memory = chosen_model(model, memory)
    tokenizer = load_tokenizer(folder)
    if words is not None:
        options["context"] = PIECE_TOKENS
        with load_model(folder, memory, **options) as (network, _):
            return record_text(network, tokenizer, words, max_tokens or 1024)
    tokens = encode_prompt(tokenizer, prompt)
    max_tokens = max_tokens or 100
    options["context"] = context_for(folder, len(tokens), max_tokens)
    with load_model(folder, memory, **options) as (network, _):
        mx.random.seed(seed)  # after loading, which draws numbers, too
        sampler = make_sampler(temp)
        return record_prompt(network, tokenizer, tokens, max_tokens, sampler=sampler)
