"""Which units of a layer belong to which rank."""

from collections.abc import Sequence
from functools import cache

import numpy as np

from ..errors import FlashError

PARTS = 1000  # in which shares are counted where nobody says them
# Neurons that lie side by side go to one rank, as far as a read of this length wants
# them; and still each rank gets so many runs of a layer, hot and cold ones.
RUN_BYTES = 256 << 10
LEAST_RUNS = 16


def parse_shares(text: str, ranks: int) -> tuple[int, ...]:
    """Shares as "2:1" has them, one for each rank.

    Raises:
        FlashError: If it has another number of them, or one that is not positive.
    """
    words = text.split(":")
    if not all(w.isdecimal() and 0 < int(w) <= 10_000 for w in words):
        raise FlashError(f"{text!r} are no shares. Give whole numbers, such as 2:1.")
    if len(words) != ranks:
        raise FlashError(
            f"{text} are {len(words)} shares for {ranks} ranks. Give one for each."
        )
    return tuple(map(int, words))


def owned(units: int, unit_bytes: int, shares: Sequence[int], rank: int) -> np.ndarray:
    """The units of a layer that belong to a rank: int array, sorted.

    They are dealt out in turn, in runs of some that lie side by side, so that each rank
    has its part of those that are asked for often, wherever they lie.
    """
    return np.flatnonzero(_owners(units, unit_bytes, tuple(shares)) == rank)


def refuse_too_few(
    what: str, units: int, unit_bytes: int, shares: Sequence[int]
) -> None:
    """Refuse shares that leave a rank without units of a layer.

    Args:
        what: The layer and its units, for the message.
    """
    if len(np.unique(_owners(units, unit_bytes, tuple(shares)))) < len(shares):
        raise FlashError(
            f"{what}, too few for the shares {':'.join(map(str, shares))}. Use fewer "
            "machines, or shares that are nearer to each other."
        )


@cache
def _owners(units: int, unit_bytes: int, shares: tuple[int, ...]) -> np.ndarray:
    """The rank of each unit."""
    most = max(units // (LEAST_RUNS * len(shares)), 1)
    run = min(max(RUN_BYTES // unit_bytes, 1), most)
    runs = -(-units // run)
    # Of every rank's positions in a fair order, run by run, the next that is due.
    due = [
        ((i + 0.5) / share, rank)
        for rank, share in enumerate(shares)
        for i in range(-(-runs * share // sum(shares)) + 1)
    ]
    order = np.array([rank for _, rank in sorted(due)[:runs]])
    return np.repeat(order, run)[:units]


def fair_shares(
    memory: Sequence[int], rates: Sequence[float], on_flash: int
) -> tuple[int, ...]:
    """Shares with which all ranks take equally long to read what they do not hold.

    A rank with the share s reads of `on_flash` bytes s * on_flash - memory, at its
    rate. Where all is held, shares are as memory is.

    Args:
        memory: Bytes for units of each rank.
        rates: Bytes per second of each rank's disk; all the same if unknown.
        on_flash: Bytes of all units.
    """
    missing = max(on_flash - sum(memory), 0)
    time_s = missing / sum(rates)
    wanted = [m + time_s * rate for m, rate in zip(memory, rates, strict=True)]
    total = sum(wanted)
    return tuple(max(round(PARTS * w / total), 1) for w in wanted)
