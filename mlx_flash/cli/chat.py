"""`mlx-flash chat`, also called `run`: a conversation in the terminal."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import FlashError
from .cache_options import CacheOptions, cache_options
from .common import chosen_model, load_with, run_options
from .load_options import LoadingOptions, loading_options
from .sampling_options import SamplingOptions, sampling_options
from .template_options import TemplateOptions, template_options

if TYPE_CHECKING:
    from ..flash import Flash
    from .terminal import Screen

MAX_TOKENS = 2048  # mlx-lm's 256 are too few for a model that thinks


@click.command()
@click.argument("name", required=False, metavar="[MODEL]")
@run_options
@click.option(
    "--context",
    type=click.IntRange(1),
    metavar="TOKENS",
    help="Tokens of KV cache reserved; a longer conversation takes slots.  "
    "[default: 2048, or what fits]",
)
@template_options
@cache_options(MAX_TOKENS)
@sampling_options
@loading_options
@click.option("--quiet", "-q", is_flag=True, help="Print answers and errors alone.")
def chat(
    name: str | None,
    model: str | None,
    memory: str | None,
    context: int | None,
    template: TemplateOptions,
    caching: CacheOptions,
    sampling: SamplingOptions,
    loading: LoadingOptions,
    quiet: bool,
) -> None:
    """Talk with MODEL, bringing FFN weights from flash as needed.

    /help lists commands. Ctrl-C ends an answer, Ctrl-D the chat. From a pipe, each line
    is a turn; \\ at its end goes on with the next line.

    \b
    Examples:
      mlx-flash chat qwen3-30b-flash --memory 8GB
      mlx-flash run mlx-community/Qwen3-30B-A3B-4bit --memory 8GB
      mlx-flash chat --model qwen3-30b-flash --system-prompt "Answer in one sentence."
      printf 'Hello\\nAnd in French?\\n' | mlx-flash chat qwen3-30b-flash
    """
    if name is not None and model is not None:
        raise click.UsageError("Name the model once: as an argument or as --model.")
    caching.check(loading.draft_model)
    arguments = loading.arguments()
    import transformers

    from ..conversation import Conversation
    from ..loading import load_model, load_tokenizer
    from .saved_prompt import kept_on_disk
    from .talk import HELP, Chat
    from .terminal import Screen, read_messages

    transformers.logging.set_verbosity_error()  # too long a prompt is our own error
    model = name or model
    free = model is None and memory is None
    folder, memory = chosen_model(model, memory)
    tokenizer = load_tokenizer(folder, loading.trust_remote_code)
    sampling.prepare(tokenizer)
    if not tokenizer.has_chat_template:
        _check_untemplated(folder, template)
    screen = Screen()
    arguments |= {
        "context": context or caching.max_kv_size,
        "progress": None if quiet else True,
    }
    loaded = load_with(partial(load_model, folder, **arguments), memory, free)
    with loaded as (network, _):
        talk = Conversation(
            network,
            tokenizer,
            template.system_prompt,
            template.chat_template_config,
            caching.max_kv_size,
            **caching.arguments(),
            **sampling.arguments(tokenizer, network.flash.vocabulary),
        )
        session = Chat(talk, network.flash, screen, quiet)
        with kept_on_disk(talk, network, caching.prompt_cache, **caching.quantised):
            if screen.live and not quiet:
                _welcome(screen, network.flash, tokenizer)
            words = [usage.split()[0] for usage in HELP]
            session.run(read_messages(screen, words))
    # At a terminal the user has seen it; a script looks at the exit code.
    sys.exit(1 if session.failed and not screen.live else 0)


def _check_untemplated(folder: Path, template: TemplateOptions) -> None:
    """A model that only continues texts has nobody to tell a system prompt."""
    if template.system_prompt is not None or template.chat_template_config is not None:
        raise FlashError(
            f"{folder} has no chat template, so --system-prompt and "
            "--chat-template-config have no place. Leave them out, or take an "
            "instruct model."
        )


def _welcome(screen: "Screen", flash: "Flash", tokenizer: Any) -> None:
    facts, budget = flash.manifest, flash.budget.total_bytes + flash.draft_bytes
    screen.note(
        f"{flash.folder.name}: {facts.model_bytes / 1e9:.2f} GB, "
        f"{budget / 1e9:.2f} GB of memory, {flash.kind.name}s from flash. "
        "/help lists commands, Ctrl-D ends the chat."
    )
    if flash.lossy:
        screen.note(f"{flash.lossy}.")
    if not tokenizer.has_chat_template:
        screen.note("It has no chat template: it continues what you write.")
