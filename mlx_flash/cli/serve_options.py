"""The options of `mlx-flash serve`: those of mlx-lm's server, and its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..errors import FlashError

LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
ONE_ANSWER = "requests are answered one after the other. Leave it out, or say 1."


def _add(command: Callable, *options: Callable) -> Callable:
    """`command` with options, in this order."""
    for option in reversed(options):
        command = option(command)
    return command


class JsonObject(click.ParamType):
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


class Bytes(click.ParamType):
    """512MB, 2GB."""

    name = "SIZE"

    def convert(self, value, param, ctx):
        from ..memory_size import parse_memory

        try:
            found = parse_memory(value)
        except FlashError as error:
            self.fail(str(error), param, ctx)
        if not isinstance(found, int):
            self.fail(f"{value!r} is no number of bytes. Try 512MB or 2GB.", param, ctx)
        return found


def listening_options(command: Callable) -> Callable:
    """Where it listens, and to whom."""
    return _add(
        command,
        click.option(
            "--host",
            default="127.0.0.1",
            show_default=True,
            help="The address to listen at; 0.0.0.0 is open to other machines.",
        ),
        click.option(
            "--port",
            type=click.IntRange(0, 65535),
            default=8080,
            show_default=True,
            help="The port to listen at; 0 takes a free one.",
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
    )


def answer_options(command: Callable) -> Callable:
    """What holds where a request says nothing."""
    return _add(
        command,
        click.option(
            "--temp",
            type=click.FloatRange(0),
            default=0.0,
            show_default=True,
            help="Sampling temperature; at 0 always the likeliest token.",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(0, 1),
            default=1.0,
            show_default=True,
            help="Nucleus sampling.",
        ),
        click.option(
            "--top-k",
            type=click.IntRange(0),
            default=0,
            show_default="0, which is off",
            help="Choose among the so many likeliest tokens; 0 among all.",
        ),
        click.option(
            "--min-p",
            type=click.FloatRange(0, 1),
            default=0.0,
            show_default=True,
            help="Leave out tokens below this share of the likeliest one.",
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
            type=JsonObject(),
            default="{}",
            help="For the chat template, such as '{\"enable_thinking\": false}'.",
        ),
        click.option(
            "--trust-remote-code", is_flag=True, help="Run a tokenizer's own code."
        ),
    )


def model_and_cache_options(command: Callable) -> Callable:
    """What is loaded beside the model, and KV caches."""
    return _add(
        command,
        click.option(
            "--adapter-path",
            type=click.Path(file_okay=False),
            metavar="FOLDER",
            help="An adapter that mlx_lm.lora trained; it counts in --memory.",
        ),
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
            help="Tokens of a draft.",
        ),
        click.option(
            "--kv-bits", type=click.IntRange(1), help="Quantise the KV cache."
        ),
        click.option(
            "--kv-group-size",
            type=click.IntRange(1),
            default=64,
            show_default=True,
            help="Values of a quantised group.",
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
            "--prompt-cache-bytes", type=Bytes(), help="All of these, at most."
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
    )


def _refused(name: str, reason: str, **settings: Any):
    """An option of mlx-lm's server that says why it is none here."""

    def refuse(ctx, param, value):
        if value:
            raise FlashError(f"{name} is no option here: {reason}")

    return click.option(
        name, hidden=True, expose_value=False, callback=refuse, **settings
    )


def options_of_others(command: Callable) -> Callable:
    """What mlx-lm's server can do and this one cannot, with the reasons."""
    return _add(
        command,
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
    )


def _only_one(ctx, param, value):
    if value not in (None, 1):
        raise FlashError(f"{param.opts[0]} cannot be {value}: {ONE_ANSWER}")
