"""KV caches of a bounded size, for models that mlx-lm gives caches of their own."""

from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from .errors import FlashError

KEPT = 4  # first tokens that a rotating cache never drops, as in mlx-lm


def rotating_cache(model: nn.Module, max_kv_size: int) -> list[Any]:
    """Caches that keep the first and the latest tokens, `max_kv_size` in all.

    mlx-lm makes them only of models without a `make_cache`, and leaves others, Llama
    among them, as they are. Where that makes plain caches, they may rotate as well.

    Raises:
        FlashError: If the model has caches of another kind.
    """
    cache = make_prompt_cache(model, max_kv_size)
    if all(type(entry) is RotatingKVCache for entry in cache):
        if all(entry.max_size <= max_kv_size for entry in cache):
            return cache
    if any(type(entry) is not KVCache for entry in cache):
        kinds = sorted({type(entry).__name__ for entry in cache})
        raise FlashError(
            f"This model's caches ({', '.join(kinds)}) cannot be made to rotate. Leave "
            "out --max-kv-size."
        )
    return [RotatingKVCache(max_size=max_kv_size, keep=KEPT) for _ in cache]
