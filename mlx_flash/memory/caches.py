"""The keys and values of all conversations that live, and what they take.

mlx-lm makes KV caches and gives them to the model; whoever holds one keeps its memory.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakMethod, WeakSet

import mlx.core as mx

from .footprint import KV_STEP, MAX_PREFILL


class Caches:
    """Every KV cache that a model was called with, as long as somebody holds it."""

    def __init__(self) -> None:
        self._entries: WeakSet[Any] = WeakSet()
        self._holders: list[WeakMethod[Callable[[], None]]] = []

    @property
    def held_bytes(self) -> int:
        """What they hold now."""
        return sum(_nbytes(entry) for entry in self._entries)

    def add_holder(self, let_go: Callable[[], None]) -> None:
        """Have a method called where memory is short, to let go of idle caches.

        It is called by the thread that calls the model, within the call. It must not
        call the model itself. Its object is not kept alive.
        """
        self._holders.append(WeakMethod(let_go))

    def let_go(self) -> bool:
        """Have all holders let go of idle caches.

        Returns:
            Whether that made any difference.
        """
        before = self.held_bytes
        for holder in self._holders:
            if (method := holder()) is not None:
                method()
        return self.held_bytes < before

    def bytes_after(
        self,
        sequences: int,
        tokens: int,
        cache: Sequence[Any],
        bytes_per_token: float,
    ) -> int:
        """What all will hold after a call that adds to some of them.

        With the mask that a batch of several sequences has beside them.

        Args:
            sequences, tokens: Of the call; so many tokens of each sequence.
            cache: mlx-lm's caches that it will add to.
            bytes_per_token: Of one sequence.
        """
        step = max(KV_STEP // sequences, 8)
        for entry in cache:
            if getattr(entry, "step", 0) > step:
                entry.step = step  # mlx-lm's 256 tokens may be a lot of memory
        self._entries.update(cache)
        held = self.held_bytes
        if sequences > 1:  # in one chunk, each sees all that is in a sequence
            seen = max((getattr(x, "_idx", 0) for x in cache), default=0) + tokens
            held += min(sequences * tokens, MAX_PREFILL) * seen
        if not any(_is_full(entry, tokens) for entry in cache):
            return held
        grown = sequences * -(-tokens // step) * step
        return int(held + grown * bytes_per_token)


def _nbytes(entry: Any) -> int:
    """What one of mlx-lm's caches holds; some kinds do not tell."""
    try:
        return entry.nbytes
    except (AttributeError, NotImplementedError):
        return 0


def _is_full(entry: Any, tokens: int) -> bool:
    """Whether a cache has to grow for so many more tokens of each sequence."""
    keys = getattr(entry, "keys", None)
    if not isinstance(keys, mx.array):
        return True
    if keys.shape[-2] == getattr(entry, "max_size", None):
        return False  # it rotates
    used = entry._idx if hasattr(entry, "_idx") else entry.offset
    return used + tokens > keys.shape[-2]
