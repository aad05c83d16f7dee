"""MLX's distributed group: adding up over all ranks."""

import time
from collections.abc import Sequence
from statistics import median

import mlx.core as mx
import numpy as np

from ..errors import FlashError, reason_of
from . import launched

LATENCY_SUMS, LATENCY_VALUES = 15, 4096  # of one token, as a layer adds them up


class Group:
    """All ranks.

    Sums are begun in the order in which they are asked for, which is the same on all
    ranks: MLX's ring mixes up two that are under way at the same time.

    Attributes:
        rank, size: This rank, and how many there are.
        timed: Wait for every sum, so that `sum_s` is the time they take.
        sums, sum_bytes, sum_s: Counters.
        latency_s: What a short sum takes, as `measure` found.
    """

    def __init__(self, group: mx.distributed.Group):
        self._group = group
        self.rank, self.size = group.rank(), group.size()
        self.timed = False
        self.sums = 0
        self.sum_bytes = 0
        self.sum_s = 0.0
        self.latency_s = 0.0
        self._last: mx.array | None = None

    def measure(self) -> None:
        """Find out what a short sum takes, together with all other ranks."""
        x = mx.zeros(LATENCY_VALUES)
        taken = []
        for _ in range(LATENCY_SUMS):
            since = time.perf_counter()
            mx.eval(mx.distributed.all_sum(x, group=self._group))
            taken.append(time.perf_counter() - since)
        self.latency_s = median(taken)

    def sum(self, x: mx.array) -> mx.array:
        """x summed over all ranks, which give arrays of one shape and dtype.

        It is begun at once: whatever happens to the rest of a call, no rank waits for
        this one in vain.
        """
        if self.timed:
            mx.eval(x)
        since = time.perf_counter()
        y = mx.distributed.all_sum(x, group=self._group)
        mx.async_eval(y)
        if self.timed:
            mx.eval(y)
            self.sum_s += time.perf_counter() - since
        self.sums += 1
        self.sum_bytes += y.nbytes
        self._last = y
        return y

    def of_rank_0(self, x: mx.array) -> mx.array:
        """Rank 0's x on all ranks, whose own may differ from it."""
        return self.sum(x if self.rank == 0 else mx.zeros_like(x))

    def settle(self) -> None:
        """Wait for the last sum: another thread or stream may begin the next one."""
        if self._last is not None:
            mx.eval(self._last)
            self._last = None

    def copy(
        self, array: mx.array | None, shape: Sequence[int], dtype: str
    ) -> mx.array:
        """Rank 0's array on every rank; the others give its shape and dtype alone."""
        kind = getattr(mx, dtype)
        wide = mx.uint8 if kind == mx.bool_ else kind
        x = mx.zeros(shape, wide) if array is None else array.astype(wide)
        y = self.sum(x).astype(kind)
        mx.eval(y)
        return y

    def tell(self, text: str) -> str:
        """Rank 0's text, at most about 1,000 bytes of it, on every rank."""
        padded = np.zeros(1024, np.int32)
        if self.rank == 0:
            data = np.frombuffer(text.encode(), np.uint8)
            padded[: len(data)] = data
        y = self.sum(mx.array(padded))
        return bytes(np.asarray(y).astype(np.uint8)).rstrip(b"\0").decode()


def join_group() -> Group | None:
    """The group that a launcher made, None where this process runs alone.

    Raises:
        FlashError: If the other ranks cannot be reached.
    """
    if not launched():
        return None
    try:
        group = mx.distributed.init(strict=True)
    except (RuntimeError, ValueError) as error:
        raise FlashError(
            f"The other machines cannot be reached: {reason_of(error)}. Check the "
            "hostfile and the network, or start without mlx.launch."
        ) from error
    return Group(group) if group.size() > 1 else None
