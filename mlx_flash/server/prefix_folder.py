"""A folder of KV caches that outlive the server: `--prompt-cache-dir`.

Each file has the tokens of one conversation (`prompt_cache`). Flash wears by what is
written, so a conversation is written again only when it has grown by a quarter, and the
file that it grew from goes. What was used longest ago goes when room is short. Only
files that say they are ours are ever deleted.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..errors import FlashError, reason_of
from ..prompt_cache import (
    SavedPrompt,
    common_tokens,
    load_prompt_cache,
    model_identity,
    read_saved_prompt,
    save_prompt_cache,
)

LEAST_NEW = 256  # tokens for which a file is worth writing
GROWTH = 4  # a conversation is written again when it has grown by one part of so many
NAMES = "prefix-*.safetensors"
PARTS = ".prefix-*.part.safetensors"
PART_S = 3600  # after which whoever began to write a file has been stopped


@dataclass(frozen=True)
class Saving:
    """Where the server keeps KV caches on disk, and how many bytes of them."""

    folder: Path
    most_bytes: int


class PrefixFolder:
    """The saved KV caches of one model, in a folder that others may share."""

    def __init__(self, saving: Saving, model: nn.Module, **settings: Any):
        """
        Args:
            model: From `mlx_flash.load`.
            settings: What decides about its KV cache besides the model.

        Raises:
            FlashError: If there can be no such folder.
        """
        self._model = model
        self._saving = saving
        self._identity = model_identity(model.flash, **settings)
        self._ours: dict[Path, SavedPrompt] = {}
        self._ignored: set[Path] = set()
        folder = saving.folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for part in folder.glob(PARTS):
                if time.time() - part.stat().st_mtime > PART_S:
                    part.unlink()
        except OSError as error:
            raise FlashError(
                f"--prompt-cache-dir {folder} cannot be used: {reason_of(error)}. "
                "Name a folder that can be written."
            ) from error
        self._look()
        others = sum(x.identity != self._identity for x in self._ours.values())
        if others:
            _say(
                f"{others} prompt caches in {folder} are of another model, of other "
                "settings or of another version of mlx-lm. They are ignored."
            )

    def longest(
        self, tokens: Sequence[int], most_bytes: int
    ) -> tuple[SavedPrompt | None, int]:
        """The file with most of the tokens, from the first on, and how many.

        Args:
            most_bytes: Larger files are left out.
        """
        best, common = None, 0
        for path, saved in self._ours.items():
            if path in self._ignored or saved.identity != self._identity:
                continue
            equal = common_tokens(saved.tokens, tokens)
            usable = saved.can_trim or equal == len(saved.tokens)
            if usable and equal > common and saved.file_bytes <= most_bytes:
                best, common = saved, equal
        return best, common

    def load(self, saved: SavedPrompt) -> list[Any] | None:
        """The cache of a file, None if the file turns out to be damaged."""
        try:
            cache = load_prompt_cache(saved, self._model, self._identity)
        except FlashError as error:
            self._ignored.add(saved.path)
            _say(f"Ignored: {error}")
            return None
        with suppress(OSError):
            os.utime(saved.path)  # the time says when it was used
        return cache

    def save(self, tokens: list[int], cache: list[Any], n_bytes: int) -> None:
        """Write a cache of so many bytes, unless a file has most of it.

        Who serves goes on when that fails: the reason is one line on stderr.
        """
        covered = self.longest(tokens, self._saving.most_bytes)[1]
        least = max(LEAST_NEW, covered // GROWTH)
        if len(tokens) - covered < least or n_bytes > self._saving.most_bytes:
            return
        path = self._saving.folder / self._name(tokens)
        try:
            self._look()
            self._make_room(n_bytes, tokens)
            save_prompt_cache(path, cache, tokens, self._identity)
            self._ours[path] = read_saved_prompt(path)
        except (FlashError, OSError) as error:
            _say(f"A prompt cache was not saved: {error}")
            return
        self._ignored.discard(path)
        if self._ours[path].can_trim:
            for older in self._prefixes_of(tokens):
                if older != path:
                    self._delete(older)
        self._make_room(0, tokens)  # headers have bytes, too

    def _name(self, tokens: list[int]) -> str:
        digest = hashlib.sha256(f"{self._identity} {tokens}".encode())
        return NAMES.replace("*", digest.hexdigest()[:32])

    def _look(self) -> None:
        """Find out which files are there now."""
        there = set(self._saving.folder.glob(NAMES))
        for path in self._ours.keys() - there:
            del self._ours[path]
        for path in sorted(there - self._ours.keys() - self._ignored):
            try:
                self._ours[path] = read_saved_prompt(path)
            except FlashError as error:
                self._ignored.add(path)
                _say(f"Ignored: {error}")

    def _make_room(self, n_bytes: int, tokens: list[int]) -> None:
        """Delete files of ours until so many bytes fit beside the others.

        Those go first that a file with `tokens` makes superfluous.
        """
        superfluous = self._prefixes_of(tokens) if n_bytes else []
        ours = sorted(self._ours, key=lambda x: (x not in superfluous, _used_time(x)))
        used = sum(saved.file_bytes for saved in self._ours.values())
        for path in ours:
            if used + n_bytes <= self._saving.most_bytes:
                return
            used -= self._ours[path].file_bytes
            self._delete(path)

    def _prefixes_of(self, tokens: list[int]) -> list[Path]:
        """Files of this model with nothing but the first of these tokens."""
        return [
            path
            for path, saved in self._ours.items()
            if saved.identity == self._identity
            and common_tokens(saved.tokens, tokens) == len(saved.tokens)
        ]

    def _delete(self, path: Path) -> None:
        del self._ours[path]
        self._ignored.discard(path)
        with suppress(OSError):  # somebody else was faster
            path.unlink()


def _used_time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
