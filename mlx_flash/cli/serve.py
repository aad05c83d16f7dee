"""`mlx-flash serve`: an HTTP server on a model from flash."""

import logging
from pathlib import Path
from typing import Any

import click

from .common import (
    check_option,
    elastic_option,
    memory_option,
    model_folder,
    page_cache_option,
    shares_option,
    skip_option,
    yes_option,
)
from .serve_options import (
    answer_options,
    listening_options,
    model_and_cache_options,
    options_of_others,
)

PROMPT_CACHE_GB = 8.0


@click.command()
@click.option(
    "--model",
    required=True,
    metavar="NAME",
    help="Flash folder, checkpoint, or a hub name of one.",
)
@yes_option
@memory_option("auto")
@click.option("--context", type=click.IntRange(1), help="Tokens of KV cache reserved.")
@page_cache_option
@elastic_option
@check_option
@shares_option
@skip_option
@listening_options
@answer_options
@model_and_cache_options
@options_of_others
def serve(
    model,
    memory,
    context,
    page_cache,
    elastic,
    check,
    shares,
    skip,
    adapter_path,
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
        folder_of_model=model_folder(model),
        context=context,
        page_cache=page_cache,
        elastic=elastic,
        check=check,
        shares=shares,
        skip=skip,
        adapter_path=adapter_path,
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
