"""`mlx-flash serve`: an HTTP server on a model from flash."""

import json
import logging
from pathlib import Path
from typing import Any

import click

from .common import (
    check_option,
    elastic_option,
    memory_option,
    page_cache_option,
)

PROMPT_CACHE_GB = 8.0
LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


class _JsonObject(click.ParamType):
    """'{"enable_thinking": false}'"""

    name = "JSON"

    def convert(self, value, param, ctx):
        try:
            found = json.loads(value)
        except (TypeError, ValueError):
            found = None
        if not isinstance(found, dict):
            self.fail(
                f"{value!r} is no JSON object. Try '{{\"enable_thinking\": false}}'.",
                param,
                ctx,
            )
        return found


class _Bytes(click.ParamType):
    """512MB, 2GB."""

    name = "SIZE"

    def convert(self, value, param, ctx):
        from ..errors import FlashError
        from ..memory_size import parse_memory

        try:
            found = parse_memory(value)
        except FlashError as error:
            self.fail(str(error), param, ctx)
        if not isinstance(found, int):
            self.fail(f"{value!r} is no number of bytes. Try 512MB or 2GB.", param, ctx)
        return found


def _listening_options(command):
    """Where it listens, and to whom."""
    for option in (
        click.option("--host", default="127.0.0.1", show_default=True),
        click.option(
            "--port", type=click.IntRange(0, 65535), default=8080, show_default=True
        ),
        click.option(
            "--allowed-origins",
            default="",
            metavar="URL,…",
            help="Web pages that may use it; * allows all.  [default: none]",
        ),
        click.option(
            "--api-key",
            envvar="MLX_FLASH_API_KEY",
            help="Answer only who brings it, as a bearer token or as x-api-key. Better "
            "given as MLX_FLASH_API_KEY: other users see the command line.",
        ),
        click.option(
            "--log-level",
            type=click.Choice(LEVELS, case_sensitive=False),
            default="WARNING",
            show_default=True,
            help="INFO has a line for each request.",
        ),
    ):
        command = option(command)
    return command


def _answer_options(command):
    """What holds where a request says nothing."""
    for option in (
        click.option(
            "--temp", type=click.FloatRange(0), default=0.0, show_default=True
        ),
        click.option(
            "--top-p", type=click.FloatRange(0, 1), default=1.0, show_default=True
        ),
        click.option(
            "--top-k", type=click.IntRange(0), default=0, show_default="0, which is off"
        ),
        click.option(
            "--min-p", type=click.FloatRange(0, 1), default=0.0, show_default=True
        ),
        click.option(
            "--max-tokens",
            type=click.IntRange(1),
            default=512,
            show_default=True,
            help="Of an answer, where a request does not say.",
        ),
        click.option(
            "--chat-template",
            metavar="TEXT|FILE",
            help="A chat template in the place of the tokenizer's own.",
        ),
        click.option(
            "--chat-template-args",
            type=_JsonObject(),
            default="{}",
            help="For the chat template, such as '{\"enable_thinking\": false}'.",
        ),
        click.option(
            "--trust-remote-code", is_flag=True, help="Run a tokenizer's own code."
        ),
    ):
        command = option(command)
    return command


def _drafting_and_cache_options(command):
    """Drafts, and KV caches."""
    for option in (
        click.option(
            "--draft-model",
            metavar="FOLDER",
            help="A small model that drafts tokens; it counts in --memory.",
        ),
        click.option(
            "--num-draft-tokens",
            type=click.IntRange(0),
            default=3,
            show_default=True,
        ),
        click.option(
            "--kv-bits", type=click.IntRange(1), help="Quantise the KV cache."
        ),
        click.option(
            "--kv-group-size", type=click.IntRange(1), default=64, show_default=True
        ),
        click.option(
            "--quantized-kv-start",
            type=click.IntRange(0),
            help="From so many tokens on.  [default: mlx-lm's]",
        ),
        click.option(
            "--prefill-step-size",
            type=click.IntRange(1),
            default=2048,
            show_default=True,
            help="Tokens of a prompt read at once, at most; memory may allow fewer.",
        ),
        click.option(
            "--prompt-cache-size",
            type=click.IntRange(0),
            metavar="N",
            help="Conversations whose KV caches wait, at most.  [default: as many as "
            "--context has room for]",
        ),
        click.option(
            "--prompt-cache-bytes", type=_Bytes(), help="All of these, at most."
        ),
        click.option(
            "--prompt-cache-dir",
            type=click.Path(file_okay=False, path_type=Path),
            metavar="DIR",
            help="Keep prompts that were read in this folder, so that a restarted "
            "server need not read them again. Off by default: it writes much, and "
            "flash wears.",
        ),
        click.option(
            "--prompt-cache-gb",
            type=click.FloatRange(0, min_open=True),
            metavar="N",
            help="At most so many GB in that folder.  [default: 8]",
        ),
    ):
        command = option(command)
    return command


def _refused(name: str, reason: str, **settings: Any):
    """An option of mlx-lm's server that says why it is none here."""

    def refuse(ctx, param, value):
        if value:
            raise click.UsageError(f"{name} is no option here: {reason}")

    return click.option(
        name, hidden=True, expose_value=False, callback=refuse, **settings
    )


ONE_ANSWER = "requests are answered one after the other. Leave it out, or say 1."


def _options_of_others(command):
    for option in (
        _refused(
            "--adapter-path",
            "adapters would have to be added to weights on flash. Fuse it into the "
            "model with mlx_lm.fuse, then convert that.",
        ),
        _refused("--pipeline", "the model runs on one machine.", is_flag=True),
        _refused(
            "--use-default-chat-template",
            "tokenizers have no default template any more. Give --chat-template.",
            is_flag=True,
        ),
        *(
            click.option(
                name,
                type=click.IntRange(1),
                hidden=True,
                expose_value=False,
                callback=_only_one,
            )
            for name in ("--decode-concurrency", "--prompt-concurrency")
        ),
    ):
        command = option(command)
    return command


def _only_one(ctx, param, value):
    if value not in (None, 1):
        raise click.UsageError(f"{param.opts[0]} cannot be {value}: {ONE_ANSWER}")


@click.command()
@click.option("--model", required=True, metavar="FOLDER", help="Flash folder.")
@memory_option("auto")
@click.option("--context", type=click.IntRange(1), help="Tokens of KV cache reserved.")
@page_cache_option
@elastic_option
@check_option
@_listening_options
@_answer_options
@_drafting_and_cache_options
@_options_of_others
def serve(
    model,
    memory,
    context,
    page_cache,
    elastic,
    check,
    draft_model,
    trust_remote_code,
    log_level,
    prompt_cache_dir,
    prompt_cache_gb,
    **options,
):
    """Serve a model over HTTP, for clients of OpenAI's API.

    One request is answered after the other; the KV caches of as many conversations as
    --context has room for wait for the next one. Requests come from this machine unless
    --host says otherwise, and from no web page unless --allowed-origins names it.

    \b
    Examples:
      mlx-flash serve --model opt-6.7b-flash --memory 7GB
      mlx-flash serve --model qwen3-30b-flash --port 8080 --log-level INFO
      mlx-flash serve --model qwen3-30b-flash --prompt-cache-dir ~/prompts
    """
    from ..server import serve as run
    from ..server.prefix_folder import Saving

    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s - %(levelname)s - %(message)s"
    )
    saving = None
    if prompt_cache_dir is not None:
        most_gb = prompt_cache_gb or PROMPT_CACHE_GB
        saving = Saving(prompt_cache_dir, int(most_gb * 1e9))
    elif prompt_cache_gb is not None:
        raise click.UsageError("--prompt-cache-gb needs --prompt-cache-dir DIR.")
    run(
        model,
        memory,
        _settings(**options),
        saving,
        context=context,
        page_cache=page_cache,
        elastic=elastic,
        check=check,
        draft_model=draft_model,
        trust_remote_code=trust_remote_code,
    )


def _settings(
    allowed_origins, temp, chat_template, chat_template_args, **options
) -> Any:
    """`server.Settings` of the command's options."""
    from ..server import Settings

    if options["quantized_kv_start"] is None:
        del options["quantized_kv_start"]
    if chat_template is not None:
        chat_template = _text_of(chat_template)
    return Settings(
        allowed_origins=tuple(x.strip() for x in allowed_origins.split(",") if x),
        temperature=temp,
        chat_template=chat_template,
        template_options=chat_template_args,
        **options,
    )


def _text_of(text_or_file: str) -> str:
    """A template that was given, or the one in the file that was named."""
    try:
        if Path(text_or_file).is_file():
            return Path(text_or_file).read_text()
    except OSError:  # too long for a name
        pass
    return text_or_file
