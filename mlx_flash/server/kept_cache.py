"""Keep the KV cache of the last answer, for a request that goes on from there.

mlx-lm's server keeps ten caches and copies the one it uses. The budget has room for
one: so it is kept once, handed over whole, and let go of where it does not fit.
"""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import (
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)

LEAST_COMMON = 16  # tokens; fewer are read again as quickly


class KeptCache:
    """At most one KV cache, and the tokens that are in it."""

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Let go of the cache."""
        self._tokens: list[int] = []
        self._cache: list[Any] = []

    def take(self, tokens: list[int], model: nn.Module) -> tuple[list[Any], int]:
        """A cache to read `tokens` with, and how many of them are in it already.

        At least one token is left to read: its output begins the answer.
        """
        kept, cache = self._tokens, self._cache
        self.drop()
        common = 0
        for ours, theirs in zip(kept, tokens[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        spare = len(kept) - common
        if common < LEAST_COMMON or (spare and not can_trim_prompt_cache(cache)):
            return make_prompt_cache(model), 0
        if spare and trim_prompt_cache(cache, spare) != spare:
            return make_prompt_cache(model), 0
        return cache, common

    def keep(self, tokens: list[int], cache: list[Any]) -> None:
        """Keep `cache`, which has read `tokens`."""
        if all(getattr(c, "offset", len(tokens)) == len(tokens) for c in cache):
            self._tokens = tokens
            self._cache = cache
