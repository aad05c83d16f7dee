"""From the options of `mlx-flash serve` to a server that listens, and to its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoints.config import read_config
from ..checkpoints.tokenizer import load_tokenizer
from ..flash import Flash
from ..loading import load
from ..memory_size import say_memory
from .app import make_app
from .conversations import Conversations
from .fields import Limits
from .listener import Listener, bind
from .meter import Meter
from .monitor import Monitor
from .prefix_folder import PrefixFolder, Saving
from .settings import Settings
from .worker import Worker

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C
STOP_S = 1.5  # for the piece of a prompt or the token that is being computed


def serve(
    model: str,
    memory: int | str,
    settings: Settings,
    saving: Saving | None = None,
    **options: Any,
) -> None:
    """Answer requests until Ctrl-C.

    Args:
        model: Flash folder, stock checkpoint with experts, or hub name.
        memory, options: As for `mlx_flash.load`.
        settings: Of the server.
        saving: Where KV caches outlive the server; None for nowhere.

    Raises:
        FlashError: If the model cannot be loaded or the port is taken.
        KeyboardInterrupt: After Ctrl-C.
    """
    with open_server(model, memory, settings, saving, **options) as listener:
        flash = listener.worker.model.flash
        way = "around" if flash.direct_io else "through"
        line = (
            f"Serving {model} at {listener.url} with "
            f"{say_memory(flash.budget.total_bytes + flash.draft_bytes)} of memory for "
            f"the model and {flash.budget.context:,} tokens of context, reading {way} "
            "the page cache."
        )
        if flash.lossy:
            line += f" Output: {flash.lossy}."
        listener.ready = lambda: print(line, file=sys.stderr, flush=True)
        listener.serve_forever()


@contextmanager
def open_server(
    model: str,
    memory: int | str,
    settings: Settings,
    saving: Saving | None = None,
    folder_of_model: Path | None = None,
    **options: Any,
) -> Iterator[Listener]:
    """A server whose `serve_forever` somebody has to call.

    Args:
        model, memory, settings, saving, options: As for `serve`.
        folder_of_model: Where `model` lies, if that was found out already.
    """
    with bind(settings.host, settings.port) as bound:
        found = folder_of_model or model
        with load(found, memory, **options) as (network, tokenizer):
            if settings.chat_template is not None:
                tokenizer = load_tokenizer(
                    network.flash.folder,
                    options.get("trust_remote_code", False),
                    settings.chat_template,
                )
            folder = None
            if saving is not None:
                folder = PrefixFolder(saving, network, **settings.kv_options)
            conversations = Conversations(
                network,
                folder,
                settings.prompt_cache_size,
                settings.prompt_cache_bytes,
            )
            limits = _limits(model, network.flash, tokenizer)
            worker = Worker(network, tokenizer, limits, settings, conversations)
            try:
                name = network.flash.folder.name if Path(model).exists() else model
                has_chat = bool(tokenizer.has_chat_template)
                monitor = Monitor(network.flash, Meter(), name, has_chat)
                app = make_app(worker, settings, monitor)
                yield Listener(app, bound, worker)
            finally:
                if not worker.stop(STOP_S):
                    # A piece of a prompt can take long, MLX cannot be interrupted, and
                    # Python would wait for its thread.
                    sys.stderr.flush()
                    os._exit(INTERRUPTED)


def _limits(model: str, flash: Flash, tokenizer: Any) -> Limits:
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
