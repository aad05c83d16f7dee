"""--prompt-cache FILE: begin with what an earlier run has read, and save it again."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

from ..conversation import Conversation
from ..errors import FlashError
from ..prompt_cache import (
    common_tokens,
    load_prompt_cache,
    model_identity,
    read_saved_prompt,
    save_prompt_cache,
)


@dataclass
class PromptFile:
    """A prompt and the KV cache with which it begins.

    Attributes:
        path: The file that is written in the end.
        identity: Of the model and its settings.
        cache: mlx-lm's caches, to be handed to the generation.
        tokens: The whole prompt.
        used: How many of them the cache holds already.
    """

    path: Path
    identity: str
    cache: list[Any]
    tokens: list[int]
    used: int = 0

    def save(self, answer: list[int]) -> None:
        """Write what the cache holds of prompt and answer, or say why it cannot be."""
        tokens = self.tokens + answer
        offsets = [getattr(entry, "offset", None) for entry in self.cache]
        held = max((n for n in offsets if type(n) is int), default=len(tokens))
        try:
            save_prompt_cache(self.path, self.cache, tokens[:held], self.identity)
        except FlashError as error:
            click.echo(f"Not saved: {error}", err=True)


def check_name(path: Path) -> None:
    """Refuse a file that could not be written, before anything is computed."""
    if path.suffix != ".safetensors":
        raise FlashError(f"{path} must end in .safetensors. Choose another name.")
    if not path.parent.is_dir():
        raise FlashError(f"{path.parent} is no folder. Make it, or name another one.")


def open_prompt_file(
    path: Path, model: nn.Module, tokens: list[int], **settings: Any
) -> PromptFile:
    """The cache of a file, cut to what the prompt has in common with it.

    A file that is damaged, or another model's, is named in a line and not used. The
    last token of the prompt is always left: something has to be read to go on.

    Args:
        settings: Of the KV cache, with which another run's cannot be mixed.
    """
    identity = model_identity(model.flash, **settings)
    if path.exists():
        try:
            saved = read_saved_prompt(path)
            used = min(common_tokens(saved.tokens, tokens), len(tokens) - 1)
            if used and (saved.can_trim or used == len(saved.tokens)):
                cache = load_prompt_cache(saved, model, identity)
                trim_prompt_cache(cache, len(saved.tokens) - used)
                return PromptFile(path, identity, cache, tokens, used)
        except FlashError as error:
            click.echo(f"Not used: {error}", err=True)
    return PromptFile(path, identity, make_prompt_cache(model), tokens)


@contextmanager
def kept_on_disk(
    talk: Conversation, model: nn.Module, path: Path | None, **settings: Any
) -> Iterator[None]:
    """Begin a conversation with the cache of a file, and write its own in the end.

    Args:
        path: None does neither.
        settings: Of the KV cache, with which another run's cannot be mixed.
    """
    if path is None:
        yield
        return
    identity = model_identity(model.flash, **settings)
    if path.exists():
        try:
            saved = read_saved_prompt(path)
            talk.restore(load_prompt_cache(saved, model, identity), saved.tokens)
        except FlashError as error:
            click.echo(f"Not used: {error}", err=True)
    yield
    if talk.cache is not None and talk.tokens:
        try:
            save_prompt_cache(path, talk.cache, talk.tokens, identity)
        except FlashError as error:
            click.echo(f"Not saved: {error}", err=True)
