"""MLX's own limits, set from the budgets of the models that are loaded.

MLX keeps freed buffers to use them again: 32 MB of them on the CPU, on Metal up to one
and a half times what the GPU may use. A budget counts them, so they are bounded while
a model is loaded. On Metal and CUDA the memory limit makes MLX give kept buffers away
before it allocates beyond it, and wait for what runs instead of running further ahead.
"""

import threading

import mlx.core as mx

_lock = threading.Lock()
_shares: list["LimitShare"] = []
_before: tuple[int, int] | None = None  # memory and cache limit of somebody else
_ours = 0, 0


class LimitShare:
    """One model's part in MLX's limits, until it is released.

    The limits are those of all models together, beside what was allocated before the
    first of them was loaded. The last one to go restores what was set before.
    """

    def __init__(self, total_bytes: int, cache_bytes: int):
        self.total_bytes = total_bytes
        self.cache_bytes = cache_bytes
        self.others_bytes = mx.get_active_memory()
        with _lock:
            _shares.append(self)
            _apply()

    def make_room(self) -> None:
        """Let the memory limit rise by what others allocated since then.

        To be called between two runs: what is there beyond all budgets then is not
        ours, a draft model for example. MLX would wait for every operation if its
        limit were exceeded for good.
        """
        with _lock:
            foreign = mx.get_active_memory() - sum(x.total_bytes for x in _shares)
            if _shares and foreign > _shares[0].others_bytes:
                _shares[0].others_bytes = foreign
                _apply()

    def change(self, total_bytes: int, cache_bytes: int) -> None:
        """Take another part than before."""
        with _lock:
            self.total_bytes = total_bytes
            self.cache_bytes = cache_bytes
            _apply()

    def release(self) -> None:
        """Give the part back; again if called again does nothing."""
        with _lock:
            if self in _shares:
                _shares.remove(self)
                _apply()


def _apply() -> None:
    """Set the limits of all shares, or what was there before the first one."""
    global _before, _ours
    if _shares:
        memory = _shares[0].others_bytes + sum(x.total_bytes for x in _shares)
        wanted = memory, sum(x.cache_bytes for x in _shares)
    elif _before is not None:
        wanted = _before
    else:
        return
    found = mx.set_memory_limit(wanted[0]), mx.set_cache_limit(wanted[1])
    if _before is None:
        _before = found
    elif not _shares:
        if found != _ours:  # somebody else has set them since: theirs stay
            mx.set_memory_limit(found[0])
            mx.set_cache_limit(found[1])
        _before = None
    _ours = wanted
