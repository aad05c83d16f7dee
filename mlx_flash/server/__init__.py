"""mlx-lm's own HTTP server, on a model whose FFNs are on flash.

What goes through it, from the outside in: `listener` (connections), `handler` (HTTP),
`bodies` (what a request may say), `worker` (answers, one at a time), `conversations`
(KV caches that wait for the next request), `prefix_folder` (those on disk).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_lm import server as mlx_server

from ..checkpoints.config import read_config
from ..errors import FlashError
from ..flash import Flash
from ..loading import load
from ..memory_size import say_memory
from .conversations import Conversations
from .fields import Limits
from .listener import Listener
from .prefix_folder import PrefixFolder, Saving
from .worker import Worker

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C
STOP_S = 1.5  # for the piece of a prompt or the token that is being computed
# Of mlx-lm's options, those that would bring in what is not on flash.
UNUSABLE = ("adapter_path", "draft_model", "pipeline")


def serve(
    model: str,
    memory: int | float | str,
    arguments: Sequence[str],
    saving: Saving | None = None,
    **options: Any,
) -> None:
    """Answer requests until Ctrl-C.

    Args:
        model: Flash folder, stock checkpoint with experts, or hub name.
        memory, options: As for `mlx_flash.load`.
        arguments: Of `mlx_lm.server`, such as "--port", "8080".
        saving: Where KV caches outlive the server; None for nowhere.

    Raises:
        FlashError: If the model cannot be loaded or the port is taken.
    """
    with open_server(model, memory, arguments, saving, **options) as listener:
        flash = listener.worker.model.flash
        budget = flash.budget
        way = "around" if flash.direct_io else "through"
        print(
            f"Serving {model} at {listener.url} with "
            f"{say_memory(budget.total_bytes)} of memory for the model and "
            f"{budget.context:,} tokens of context, reading {way} the page cache.",
            file=sys.stderr,
            flush=True,
        )
        try:
            listener.serve_forever()
        except KeyboardInterrupt:
            interrupted = True
        else:
            interrupted = False
    if interrupted:
        # Threads of connections may hold locks that Python wants at its own end.
        os._exit(INTERRUPTED)


@contextmanager
def open_server(
    model: str,
    memory: int | float | str,
    arguments: Sequence[str],
    saving: Saving | None = None,
    **options: Any,
) -> Iterator[Listener]:
    """A listening server, whose `serve_forever` somebody has to call.

    Args:
        model, memory, arguments, saving, options: As for `serve`.
    """
    provider = _provider(model, arguments)
    asked = provider.cli_args
    with Listener(asked.host, asked.port) as listener:
        trusted = bool(asked.trust_remote_code)
        with load(model, memory, trusted, **options) as (network, tokenizer):
            if asked.chat_template:
                tokenizer.chat_template = asked.chat_template
                tokenizer.has_chat_template = True
            limits = _limits(model, network.flash, tokenizer)
            folder = None
            if saving is not None:
                folder = PrefixFolder(saving, network, **_kv_settings(asked))
            conversations = Conversations(network, folder)
            worker = Worker(provider, network, tokenizer, limits, conversations)
            try:
                listener.listen(worker)
                yield listener
            finally:
                if not worker.stop(STOP_S):
                    # A piece of a prompt can take long, and MLX cannot be interrupted.
                    os._exit(INTERRUPTED)


def _provider(model: str, arguments: Sequence[str]) -> mlx_server.ModelProvider:
    """mlx-lm's options, parsed by mlx-lm; its defaults let every page in.

    Raises:
        FlashError: If one of them does not go with models on flash.
    """
    parsed: list[mlx_server.ModelProvider] = []
    original = mlx_server.run
    argv = sys.argv

    def take(host, port, provider, **_) -> None:
        parsed.append(provider)

    mlx_server.run = take  # type: ignore[assignment]  # called with these three alone
    sys.argv = ["mlx-flash serve", "--allowed-origins", "", *arguments]
    sys.argv += ["--model", model]
    try:
        mlx_server.main()
    finally:
        mlx_server.run = original
        sys.argv = argv
    asked: argparse.Namespace = parsed[0].cli_args
    for name in UNUSABLE:
        if getattr(asked, name):
            option = "--" + name.replace("_", "-")
            raise FlashError(
                f"{option} does not go with models on flash: leave it out."
            )
    return parsed[0]


def _kv_settings(asked: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what is in a KV cache."""
    if asked.kv_bits is None:
        return {}
    return {
        "kv_bits": asked.kv_bits,
        "kv_group_size": asked.kv_group_size,
        "quantized_kv_start": asked.quantized_kv_start,
    }


def _limits(model: str, flash: Flash, tokenizer) -> Limits:
    config = read_config(flash.folder)
    text = config | (config.get("text_config") or {})
    tokens = flash.budget.context
    if flash.positions is not None:
        tokens = min(tokens, flash.positions)
    folder = flash.folder
    name = str(folder.resolve()) if Path(model).exists() else model
    names = {"default_model", model, name, str(folder), folder.name}
    vocabulary = text.get("vocab_size") or tokenizer.vocab_size
    return Limits(name, frozenset(names), vocabulary, tokens)
