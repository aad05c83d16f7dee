"""Keep the KV caches of several conversations, for requests that go on from there.

Together with the one that is being answered, they stay within the bytes that the budget
reserves for KV cache: what was used longest ago goes first. So idle conversations never
take slots from the model. The running one counts with a layer's part twice, because
mlx-lm copies that to make it longer. mlx-lm's server keeps ten caches, whatever they
take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import (
    KVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)

from ..arrays import arrays_of
from ..memory.footprint import KV_STEP
from ..prompt_cache import common_tokens
from .prefix_folder import PrefixFolder

LEAST_COMMON = 16  # tokens; fewer are read again as quickly
LEAST_LOADED = 64  # tokens that a file must have beyond what is in memory


@dataclass
class Kept:
    """A KV cache, the tokens that it has read and the bytes that it holds."""

    tokens: list[int]
    cache: list[Any]
    n_bytes: int


class Conversations:
    """KV caches that wait for a request, at most so many bytes of them.

    Attributes:
        room_bytes: For all of them and the one that is being answered.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: PrefixFolder | None = None,
        most: int | None = None,
        most_bytes: int | None = None,
    ):
        """
        Args:
            model: From `mlx_flash.load`.
            folder: Where prefixes outlive the process, if anywhere.
            most: So many are kept, at most.
            most_bytes: Of the caches that wait.
        """
        self.room_bytes = model.flash.budget.kv_bytes
        self._most = most
        self._most_bytes = most_bytes
        self._model = model
        self._shapes = model.flash.shapes
        self._folder = folder
        self._kept: list[Kept] = []  # what was used longest ago comes first

    def __len__(self) -> int:
        return len(self._kept)

    def drop(self) -> None:
        """Let go of all caches."""
        self._kept.clear()

    def begin(self, tokens: list[int], anew: bool = False) -> tuple[list[Any], int]:
        """A cache to read `tokens` with, and how many of them are in it already.

        At least one token is left to read: its output begins the answer.

        Args:
            anew: Whether to read all of them.
        """
        cache, common = (None, 0) if anew else self._found(tokens[:-1])
        if cache is None:
            cache = make_prompt_cache(self._model)
        needed_bytes = max(cache_bytes(cache), self._bytes_of(len(tokens)))
        self._make_room(needed_bytes + needed_bytes // len(cache))
        return cache, common

    def grow(self, cache: list[Any]) -> None:
        """Have others give way to `cache`, which a token may make longer."""
        if self._kept:
            step_bytes = int(KV_STEP * self._shapes.kv_bytes_per_token)
            needed_bytes = cache_bytes(cache) + step_bytes
            self._make_room(needed_bytes + needed_bytes // len(cache))

    def keep(self, tokens: list[int], cache: list[Any]) -> None:
        """Keep `cache`, which has read the first of `tokens`, or all."""
        read = _tokens_read(cache)
        if read is not None and LEAST_COMMON <= read <= len(tokens):
            n_bytes = cache_bytes(cache)
            self._make_room(n_bytes)
            self._kept.append(Kept(tokens[:read], cache, n_bytes))
            self._drop_surplus()

    def save(self) -> None:
        """Write what was kept last to the folder, if it is worth it."""
        if self._folder is not None and self._kept:
            last = self._kept[-1]
            self._folder.save(last.tokens, last.cache, last.n_bytes)

    def _found(self, tokens: list[int]) -> tuple[list[Any] | None, int]:
        """The cache that has read most of `tokens` and nothing else, if there is one.

        Where that takes tokens away from a conversation that may go on, it is copied if
        there is room for both.
        """
        loaded = self._loaded(tokens, self._longest(tokens)[1])
        if loaded is not None:
            return loaded
        kept, common = self._longest(tokens)
        if kept is None:
            return None, 0
        spare = len(kept.tokens) - common
        if spare:
            used = sum(entry.n_bytes for entry in self._kept)
            if used + self._bytes_of(len(tokens)) <= self.room_bytes:
                if copy := _copied(kept.cache, common):
                    return copy, common
        self._kept.remove(kept)
        return _trimmed(kept.cache, spare), common

    def _longest(self, tokens: list[int]) -> tuple[Kept | None, int]:
        """Who has read most of the tokens, and how many."""
        kept, common = None, 0
        for entry in self._kept:
            equal = common_tokens(entry.tokens, tokens)
            whole = equal == len(entry.tokens)
            usable = whole or can_trim_prompt_cache(entry.cache)
            if usable and equal >= LEAST_COMMON and equal > common:
                kept, common = entry, equal
        return kept, common

    def _loaded(
        self, tokens: list[int], common: int
    ) -> tuple[list[Any] | None, int] | None:
        """A cache from the folder that has more than `common` of the tokens."""
        if self._folder is None:
            return None
        saved, equal = self._folder.longest(tokens, self.room_bytes)
        if saved is None or equal < common + LEAST_LOADED:
            return None
        self._make_room(saved.file_bytes)
        cache = self._folder.load(saved)
        if cache is None:
            return None
        return _trimmed(cache, len(saved.tokens) - equal), equal

    def _make_room(self, needed_bytes: int) -> None:
        """Let go of caches until there are so many bytes beside them."""
        used = sum(entry.n_bytes for entry in self._kept)
        if used + needed_bytes <= self.room_bytes:
            return
        while self._kept and used + needed_bytes > self.room_bytes:
            used -= self._kept.pop(0).n_bytes
        mx.clear_cache()  # of the buffers that they had

    def _drop_surplus(self) -> None:
        """Let go of caches beyond the limits that were given."""
        if self._most is not None:
            del self._kept[: max(len(self._kept) - self._most, 0)]
        if self._most_bytes is not None:
            while sum(entry.n_bytes for entry in self._kept) > self._most_bytes:
                self._kept.pop(0)

    def _bytes_of(self, tokens: int) -> int:
        """What a cache takes that reads so many tokens and begins to answer.

        The first new token is computed before anybody asks `grow`: so a step more.
        """
        steps = -(-tokens // KV_STEP) + 1
        per_token = self._shapes.kv_bytes_per_token
        return int(self._shapes.kv_bytes_fixed + steps * KV_STEP * per_token)


def cache_bytes(cache: list[Any]) -> int:
    """What mlx-lm's caches hold."""
    arrays = arrays_of([entry.state for entry in cache])
    return sum(array.nbytes for array in arrays.values())


def _tokens_read(cache: list[Any]) -> int | None:
    """How many tokens a cache has read, None if it does not tell."""
    single = [x for entry in cache for x in getattr(entry, "caches", [entry])]
    found = {entry.offset for entry in single if hasattr(entry, "offset")}
    return found.pop() if len(found) == 1 else None


def _copied(cache: list[Any], tokens: int) -> list[Any] | None:
    """A cache of its own with the first tokens of another; None for other kinds."""
    if not all(type(entry) is KVCache for entry in cache):
        return None
    copy = []
    for entry in cache:
        keys, values = entry.keys_and_values()
        fresh = KVCache()
        fresh.step = KV_STEP
        fresh.update_and_fetch(keys[..., :tokens, :], values[..., :tokens, :])
        copy.append(fresh)
    mx.eval([entry.state for entry in copy])
    return copy


def _trimmed(cache: list[Any], spare: int) -> list[Any]:
    """The same cache without its last tokens."""
    if spare and trim_prompt_cache(cache, spare) != spare:
        raise RuntimeError(f"a KV cache would not lose {spare} tokens")
    return cache
