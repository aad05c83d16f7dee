"""`mlx-flash serve`: mlx-lm's server on a model from flash."""

from pathlib import Path

import click

from .common import (
    check_option,
    elastic_option,
    memory_option,
    page_cache_option,
)

PROMPT_CACHE_GB = 8.0


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--model", required=True, metavar="FOLDER", help="Flash folder.")
@memory_option("auto")
@click.option("--context", type=click.IntRange(1), help="Tokens of KV cache reserved.")
@page_cache_option
@elastic_option
@check_option
@click.option(
    "--prompt-cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep prompts that were read in this folder, so that a restarted server need "
    "not read them again. Off by default: it writes much, and flash wears.",
)
@click.option(
    "--prompt-cache-gb",
    type=click.FloatRange(0, min_open=True),
    metavar="N",
    help="At most so many GB in that folder.  [default: 8]",
)
@click.argument("server_options", nargs=-1, type=click.UNPROCESSED)
def serve(model, memory, server_options, prompt_cache_dir, prompt_cache_gb, **options):
    """Serve a model with mlx-lm's HTTP server, which takes all further options.

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

    saving = None
    if prompt_cache_dir is not None:
        most_gb = prompt_cache_gb or PROMPT_CACHE_GB
        saving = Saving(prompt_cache_dir, int(most_gb * 1e9))
    elif prompt_cache_gb is not None:
        raise click.UsageError("--prompt-cache-gb needs --prompt-cache-dir DIR.")
    run(model, memory, server_options, saving, **options)
