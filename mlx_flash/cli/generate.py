"""`mlx-flash generate`: answer a prompt, and say what it cost."""

import json
import os
import sys
from functools import partial
from typing import Any

import click

from ..errors import FlashError
from .cache_options import CacheOptions, cache_options
from .common import INTERRUPTED, chosen_model, json_option, load_with, run_options
from .load_options import LoadingOptions, loading_options
from .sampling_options import SamplingOptions, sampling_options
from .template_options import TemplateOptions, template_options

MAX_TOKENS = 100


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "--prompt",
    "-p",
    "named",
    metavar="TEXT",
    help="The prompt, instead of the argument; - reads stdin.",
)
@run_options
@template_options
@click.option(
    "--prefill-response",
    metavar="TEXT",
    help="How the answer begins; it is not printed.",
)
@click.option(
    "--ignore-chat-template",
    is_flag=True,
    help="Continue the prompt as it is, also if the model could answer it.",
)
@cache_options(MAX_TOKENS)
@sampling_options
@loading_options
@json_option
@click.option("--quiet", "-q", is_flag=True, help="Print the text alone.")
def generate(
    prompt: str | None,
    named: str | None,
    model: str | None,
    memory: str | None,
    template: TemplateOptions,
    prefill_response: str | None,
    ignore_chat_template: bool,
    caching: CacheOptions,
    sampling: SamplingOptions,
    loading: LoadingOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Answer PROMPT (- reads stdin), bringing FFN weights from flash as needed.

    A model with a chat template answers; another one continues the text.

    \b
    Examples:
      mlx-flash generate "Once upon a time"
      mlx-flash generate "Three uses for old slate" --model qwen3-flash --memory 7GB
      cat note.txt | mlx-flash generate - --model qwen3-flash --json
      mlx-flash generate "Dear all," --model llama-flash --ignore-chat-template
    """
    text = _read_prompt(_chosen_prompt(prompt, named))
    caching.check(loading.draft_model)
    arguments = loading.arguments()
    asked = [template.system_prompt, prefill_response, template.chat_template_config]
    templated = any(value is not None for value in asked)
    if ignore_chat_template and templated:
        raise click.UsageError(
            "--ignore-chat-template leaves no place for --system-prompt, "
            "--prefill-response and --chat-template-config."
        )
    import transformers

    from ..loading import load_model, load_tokenizer
    from ..progress import Bar
    from ..prompts import encode_prompt
    from .saved_prompt import open_prompt_file

    transformers.logging.set_verbosity_error()  # too long a prompt is our own error
    free = model is None and memory is None
    folder, memory = chosen_model(model, memory)
    tokenizer = load_tokenizer(folder, loading.trust_remote_code)
    sampling.prepare(tokenizer)
    if tokenizer.has_chat_template and not ignore_chat_template:
        tokens = _encode(tokenizer, text, template, prefill_response)
    elif templated:
        raise FlashError(
            f"{folder} has no chat template, so --system-prompt, --prefill-response "
            "and --chat-template-config have no place. Write all into the prompt, or "
            "take an instruct model."
        )
    else:
        tokens = encode_prompt(tokenizer, text)
    shown = None if quiet or as_json else True
    arguments |= {"context": _context(folder, len(tokens), caching), "progress": shown}
    loaded = load_with(partial(load_model, folder, **arguments), memory, free)
    cached = 0
    with loaded as (network, _):
        steps = caching.arguments() | {"max_kv_size": caching.max_kv_size}
        steps |= sampling.arguments(tokenizer, network.flash.vocabulary)
        saved = None
        if caching.prompt_cache:
            saved = open_prompt_file(
                caching.prompt_cache, network, tokens, **caching.quantised
            )
            cached = saved.used
            steps |= {"prompt_cache": saved.cache, "history": tokens[:cached]}
        with Bar("reading the prompt", shown=None, unit="token") as bar:
            steps["prompt_progress_callback"] = bar.reach
            code = _stream(network, tokenizer, tokens[cached:], steps, as_json)
        run = network.flash.run
        if saved and not code:
            saved.save(run.tokens)
        report = network.flash.report()
    if as_json:
        result = {
            "text": run.text,
            "tokens": run.tokens,
            "prompt_tokens": len(tokens),
            "cached_tokens": cached,
            "generation_tokens": len(run.tokens),
            "finish_reason": "interrupted" if code else run.last.finish_reason,
            "stats": report.to_dict(),
        }
        click.echo(json.dumps(result))
    else:
        if not code and not run.text:
            click.echo(_why_empty(tokenizer, run.tokens), err=True)
        if not quiet:
            click.echo(report, err=True)
    sys.exit(code)


def _chosen_prompt(prompt: str | None, named: str | None) -> str:
    if prompt is not None and named is not None:
        raise click.UsageError("Give the prompt once: as an argument or as --prompt.")
    given = named if prompt is None else prompt
    if given is None:
        raise click.UsageError(
            'Missing the prompt. Try: mlx-flash generate "Once upon a time"'
        )
    return given


def _read_prompt(prompt: str) -> str:
    data = os.fsencode(prompt)
    if prompt == "-":
        data = sys.stdin.buffer.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FlashError(
            f"The prompt is not text in UTF-8 (byte {data[error.start]:#x} at "
            f"{error.start}). Convert it first, with iconv for example."
        ) from error
    if not text.strip():
        from ..prompts import EMPTY

        raise FlashError(EMPTY)
    return text


def _encode(
    tokenizer: Any, text: str, template: TemplateOptions, prefill: str | None
) -> list[int]:
    """The prompt as a conversation of one question, as the chat template writes it."""
    from ..prompts import encode_messages

    messages = [{"role": "user", "content": text}]
    if template.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": template.system_prompt})
    if prefill is not None:
        messages.append({"role": "assistant", "content": prefill})
    return encode_messages(tokenizer, messages, template.chat_template_config)


def _context(folder, prompt_tokens: int, caching: CacheOptions) -> int | None:
    from ..prompts import context_for

    context = context_for(folder, prompt_tokens, caching.max_tokens)
    most = caching.max_kv_size
    return min(context or most, most) if most else context


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


def _why_empty(tokenizer: Any, tokens: list[int]) -> str:
    """Why nothing was printed: the user would look for a mistake elsewhere."""
    if tokens and tokens[0] in tokenizer.eos_token_ids:
        end = tokenizer.decode(tokens[:1])
        return (
            f"The answer is empty: its first token, {end}, ends it. Ask otherwise, or "
            "try --ignore-chat-template."
        )
    return "The answer is empty: it begins with a --stop text or has no visible text."
