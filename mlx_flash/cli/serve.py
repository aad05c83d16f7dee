"""`mlx-flash serve`: mlx-lm's server on a model from flash."""

import click

from .common import (
    check_option,
    elastic_option,
    memory_option,
    page_cache_option,
)


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--model", required=True, metavar="FOLDER", help="Flash folder.")
@memory_option("auto")
@click.option("--context", type=click.IntRange(1), help="Tokens of KV cache reserved.")
@page_cache_option
@elastic_option
@check_option
@click.argument("server_options", nargs=-1, type=click.UNPROCESSED)
def serve(model, memory, server_options, **options):
    """Serve a model with mlx-lm's HTTP server, which takes all further options.

    One request is answered after the other. Requests come from this machine unless
    --host says otherwise, and from no web page unless --allowed-origins names it.

    \b
    Examples:
      mlx-flash serve --model opt-6.7b-flash --memory 7GB
      mlx-flash serve --model qwen3-30b-flash --port 8080 --log-level INFO
    """
    from ..server import serve as run

    run(model, memory, server_options, **options)
