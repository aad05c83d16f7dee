"""The command line: parse, call the library, print.

Text goes to stdout, progress and figures to stderr. Nothing here imports MLX before a
command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from ._version import __version__
from .errors import FlashError

DEMO_MODEL = Path(__file__).parent / "demo_model"
DEMO_MEMORY = "50%"
INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


class _Commands(click.Group):
    """Prints a FlashError as one line and ends with exit code 1."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except FlashError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)


class Memory(click.ParamType):
    """7GB, 512MB, 50% or auto."""

    name = "SIZE|PERCENT|auto"

    def convert(self, value, param, ctx):
        from .sizes import parse_memory

        try:
            parse_memory(value)
        except FlashError as error:
            self.fail(str(error), param, ctx)
        return value


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-flash")
def main():
    """Run language models larger than this machine's memory.

    FFN weights stay on the SSD and are read as they are needed; the rest is MLX and
    mlx-lm.
    """
    # Else transformers, of which only tokenizers are used, asks for PyTorch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@main.command()
@click.argument("prompt")
@click.option(
    "--model",
    default=None,
    metavar="FOLDER",
    help="Flash folder.  [default: demo model]",
)
@click.option(
    "--memory",
    type=Memory(),
    default=None,
    envvar="MLX_FLASH_MEMORY",
    help=f"All that the model may hold.  [default: auto; demo model: {DEMO_MEMORY}]",
)
@click.option("--max-tokens", "-m", default=100, show_default=True, help="New tokens.")
@click.option(
    "--temp",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Sampling temperature.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Nucleus sampling.",
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Seed of the sampling.")
@click.option(
    "--policy",
    type=click.Choice(["lru", "window"]),
    default=None,
    help="What stays in memory: all that fits, or a window.  [default: lru]",
)
@click.option(
    "--window",
    type=click.IntRange(1),
    default=None,
    metavar="K",
    help="Keep what the last K tokens used; implies --policy window.",
)
@click.option("--no-predictor", is_flag=True, help="Compute every neuron: exact, slow.")
@click.option("--page-cache", is_flag=True, help="Let the system cache what is read.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.option("--quiet", "-q", is_flag=True, help="Print the text alone.")
def generate(
    prompt,
    model,
    memory,
    max_tokens,
    temp,
    top_p,
    seed,
    policy,
    window,
    no_predictor,
    page_cache,
    as_json,
    quiet,
):
    """Continue PROMPT (- reads stdin), bringing FFN weights from flash as needed.

    \b
    Examples:
      mlx-flash generate "Once upon a time"
      mlx-flash generate "The recipe" --model opt-6.7b-flash --memory 7GB
      cat note.txt | mlx-flash generate - --model opt-6.7b-flash --json
    """
    prompt = _read_prompt(prompt)
    if max_tokens < 1 and max_tokens != -1:
        raise click.BadParameter(
            "give at least 1, or -1 for no limit", param_hint="--max-tokens"
        )
    if window and policy == "lru":
        raise click.UsageError("--window goes with --policy window.")
    import mlx.core as mx
    import transformers
    from mlx_lm.sample_utils import make_sampler

    from . import generation
    from .assembly import can_stream
    from .hub import find_model
    from .loader import load_model, load_tokenizer

    transformers.logging.set_verbosity_error()  # too long a prompt is our own error
    folder = find_model(model, checkpoint=can_stream) if model else DEMO_MODEL
    tokenizer = load_tokenizer(folder)
    tokens = generation.encode_prompt(tokenizer, prompt)
    loaded = load_model(
        folder,
        memory or ("auto" if model else DEMO_MEMORY),
        predictor=not no_predictor,
        policy=policy or ("window" if window else "lru"),
        window=window or 4,
        context=generation.context_for(folder, len(tokens), max_tokens),
        page_cache=page_cache,
    )
    if seed is not None:
        mx.random.seed(seed)
    sampler = make_sampler(temp, top_p if top_p < 1 else 0.0)
    with loaded as (network, _):
        code = _stream(network, tokenizer, tokens, max_tokens, sampler, as_json)
        run = network.flash.run
        figures = generation.report(network.flash)
        lines = generation.summary(network.flash)
    if as_json:
        text = {
            "text": run.text,
            "tokens": run.tokens,
            "prompt_tokens": len(tokens),
            "generation_tokens": len(run.tokens),
            "finish_reason": "interrupted" if code else run.last.finish_reason,
            "stats": figures,
        }
        click.echo(json.dumps(text))
    elif not quiet:
        click.echo(lines, err=True)
    sys.exit(code)


def _read_prompt(prompt: str) -> str:
    data = os.fsencode(prompt)
    if prompt == "-":
        data = sys.stdin.buffer.read().strip()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FlashError(
            f"The prompt is not text in UTF-8 (byte {data[error.start]:#x} at "
            f"{error.start}). Convert it first, with iconv for example."
        ) from error


def _stream(model, tokenizer, tokens, max_tokens, sampler, silent) -> int:
    from .generation import stream_generate

    code = 0
    try:
        for step in stream_generate(
            model, tokenizer, tokens, max_tokens=max_tokens, sampler=sampler
        ):
            if not silent:
                click.echo(step.text, nl=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if not silent:
        click.echo()
    return code


@main.command()
@click.argument("source")
@click.option("-o", "--output", required=True, metavar="FOLDER", help="Where to write.")
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Of all weights.  [default: the checkpoint's]",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Text to train predictors on.  [default: sampled from the model]",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(1),
    default=16384,
    show_default=True,
    help="How much of it.",
)
@click.option(
    "--rank", type=int, help="Of all predictors, 0 for none.  [default: by layer]"
)
@click.option(
    "--threshold",
    type=float,
    help="Probability from which a neuron is read.  [default: by --recall]",
)
@click.option(
    "--recall",
    default=0.95,
    show_default=True,
    help="Share of active neurons that predictors must find.",
)
@click.option("--bits", type=int, help="Quantise experts.  [default: as they are]")
@click.option("--group-size", type=int, help="Weights that share a scale.")
@click.option(
    "--mode", default="affine", show_default=True, help="affine, mxfp4, mxfp8 or nvfp4."
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier flash folder.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bars.")
def convert(source, output, quiet, **options):
    """Convert SOURCE, a checkpoint's folder or hub name, to a flash folder.

    Interrupted, it goes on where it stopped when the same command is run again.

    \b
    Examples:
      mlx-flash convert facebook/opt-6.7b -o opt-6.7b-flash --calibration notes.txt
      mlx-flash convert ./my-opt -o my-opt-flash --dtype float16
    """
    from .converters.convert import convert as run

    try:
        run(source, output, progress=not quiet, **options)
    except KeyboardInterrupt:
        click.echo("Interrupted. The same command goes on where it stopped.", err=True)
        raise
    if not quiet:
        click.echo(
            f'{output} is ready: mlx-flash generate "…" --model {output}', err=True
        )


@main.command()
@click.argument("model", default=str(DEMO_MODEL), metavar="[FOLDER]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(model, as_json):
    """Say what of a model is resident and what is on flash, layer by layer.

    Without FOLDER, of the demo model.
    """
    from .inspection import facts, table

    click.echo(json.dumps(facts(model)) if as_json else table(model))


@main.command()
@click.argument("model", default=str(DEMO_MODEL), metavar="[FOLDER]")
def verify(model):
    """Compare every weight file of a model with the digest noted at conversion.

    Without FOLDER, of the demo model.
    """
    from .inspection import verify as check

    check(model, lambda name: click.echo(f"ok  {name}"))


if __name__ == "__main__":
    main()
