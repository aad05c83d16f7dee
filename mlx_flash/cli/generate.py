"""`mlx-flash generate`: continue a prompt, and say what it cost."""

import json
import os
import sys

import click

from ..errors import FlashError
from .common import (
    INTERRUPTED,
    check_option,
    chosen_model,
    elastic_option,
    json_option,
    page_cache_option,
    run_options,
    sampling_options,
)
from .generate_options import draft_options, kv_options


@click.command()
@click.argument("prompt")
@run_options
@click.option("--max-tokens", "-m", default=100, show_default=True, help="New tokens.")
@sampling_options(temp=0.0, seed=None)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Nucleus sampling.",
)
@click.option(
    "--policy",
    type=click.Choice(["lru", "lrfu", "window"]),
    default=None,
    help="What stays in memory: what was used last, what was used often and lately, "
    "or a window.  [default: lrfu for neurons, lru for others]",
)
@click.option(
    "--window",
    type=click.IntRange(1),
    default=None,
    metavar="K",
    help="Keep what the last K tokens used; implies --policy window.",
)
@click.option(
    "--trace",
    type=click.Path(),
    metavar="FILE.npz",
    help="Divide memory over layers by a recorded run.  [default: evenly, or whole "
    "layers where that saves waiting]",
)
@click.option("--no-predictor", is_flag=True, help="Compute every neuron: exact, slow.")
@click.option(
    "--look-ahead", is_flag=True, help="Read early what the next layer will need."
)
@draft_options
@kv_options
@page_cache_option
@elastic_option
@check_option
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the code that the folder's tokenizer brings, if it brings any.",
)
@json_option
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
    draft_model,
    draft_ngrams,
    num_draft_tokens,
    kv_bits,
    kv_group_size,
    quantized_kv_start,
    max_kv_size,
    prompt_cache,
    trust_remote_code,
    as_json,
    quiet,
    **options,
):
    """Continue PROMPT (- reads stdin), bringing FFN weights from flash as needed.

    \b
    Examples:
      mlx-flash generate "Once upon a time"
      mlx-flash generate "The recipe" --model opt-6.7b-flash --memory 7GB
      cat note.txt | mlx-flash generate - --model opt-6.7b-flash --json
      mlx-flash generate "Dear all," --model llama-flash --draft-model llama-1b
    """
    prompt = _read_prompt(prompt)
    if max_tokens < 1 and max_tokens != -1:
        raise click.BadParameter(
            "give at least 1, or -1 for no limit", param_hint="--max-tokens"
        )
    if window and policy in ("lru", "lrfu"):
        raise click.UsageError("--window goes with --policy window.")
    if draft_model and draft_ngrams:
        raise click.UsageError("Either --draft-model or --draft-ngrams drafts.")
    if max_kv_size and (kv_bits or prompt_cache):
        raise click.UsageError(
            "--max-kv-size goes with neither --kv-bits nor --prompt-cache."
        )
    import mlx.core as mx
    import transformers
    from mlx_lm.sample_utils import make_sampler

    from .. import generation
    from ..loading import load_model, load_tokenizer
    from .saved_prompt import check_name, open_prompt_file

    if prompt_cache:
        check_name(prompt_cache)
    transformers.logging.set_verbosity_error()  # too long a prompt is our own error
    folder, memory = chosen_model(model, memory)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    tokens = generation.encode_prompt(tokenizer, prompt)
    loaded = load_model(
        folder,
        memory,
        predictor=not no_predictor,
        policy=policy or ("window" if window else "auto"),
        window=window or 4,
        context=_context(folder, len(tokens), max_tokens, max_kv_size),
        draft_model=draft_model,
        **options,
    )
    settings = {}
    if kv_bits:
        settings = {
            "kv_bits": int(kv_bits),
            "kv_group_size": int(kv_group_size),
            "quantized_kv_start": quantized_kv_start,
        }
    if seed is not None:
        mx.random.seed(seed)
    steps = {
        "max_tokens": max_tokens,
        "sampler": make_sampler(temp, top_p if top_p < 1 else 0.0),
        "draft_ngrams": draft_ngrams or 0,
        "num_draft_tokens": num_draft_tokens,
        "max_kv_size": max_kv_size,
        **settings,
    }
    cached = 0
    with loaded as (network, _):
        saved = None
        if prompt_cache:
            saved = open_prompt_file(prompt_cache, network, tokens, **settings)
            cached = saved.used
            steps |= {"prompt_cache": saved.cache, "history": tokens[:cached]}
        code = _stream(network, tokenizer, tokens[cached:], steps, as_json)
        run = network.flash.run
        if saved and not code:
            saved.save(run.tokens)
        report = network.flash.report()
    if as_json:
        text = {
            "text": run.text,
            "tokens": run.tokens,
            "prompt_tokens": len(tokens),
            "cached_tokens": cached,
            "generation_tokens": len(run.tokens),
            "finish_reason": "interrupted" if code else run.last.finish_reason,
            "stats": report.to_dict(),
        }
        click.echo(json.dumps(text))
    elif not quiet:
        click.echo(report, err=True)
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


def _context(folder, prompt_tokens, max_tokens, max_kv_size) -> int | None:
    from ..generation import context_for

    context = context_for(folder, prompt_tokens, max_tokens)
    return min(context or max_kv_size, max_kv_size) if max_kv_size else context


def _stream(model, tokenizer, tokens, options, silent) -> int:
    from ..generation import stream_generate

    code = 0
    try:
        for step in stream_generate(model, tokenizer, tokens, **options):
            if not silent:
                click.echo(step.text, nl=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if not silent:
        click.echo()
    return code
