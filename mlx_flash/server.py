"""mlx-lm's own HTTP server, on models whose FFNs are on flash."""

import sys
from collections.abc import Callable, Sequence

from .loading import load


def make_load(memory: int | str, **options) -> Callable:
    """A function that mlx-lm's server can call where it calls `mlx_lm.load`.

    Args:
        memory, options: As for `mlx_flash.load`.
    """

    def server_load(
        path, *_, return_config: bool = False, trust_remote_code: bool = False, **__
    ):
        model, tokenizer = load(path, memory, bool(trust_remote_code), **options)
        config = {"model_type": model.flash.manifest.model_type}
        return (model, tokenizer, config) if return_config else (model, tokenizer)

    return server_load


def serve(model: str, memory: int | str, arguments: Sequence[str], **options) -> None:
    """Run `mlx_lm.server` until it is interrupted.

    Args:
        model: Flash folder, stock checkpoint with experts, or hub name.
        memory, options: As for `mlx_flash.load`.
        arguments: Of `mlx_lm.server`, such as "--port", "8080".
    """
    from mlx_lm import server

    original, argv = server.load, sys.argv
    server.load = make_load(memory, **options)
    sys.argv = ["mlx-flash serve", "--model", model, *arguments]
    try:
        server.main()
    finally:
        server.load, sys.argv = original, argv
