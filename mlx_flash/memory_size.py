"""Amounts of memory as people write them."""

import re

from .errors import FlashError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
MAX_BYTES = 10**18  # more is said by mistake, and would not fit a float
# Fewer bytes than any model takes: who gives such a number without a unit, means one.
LEAST_BARE = 1000
AMOUNT = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(%|[KMGT]I?B?|B|)")
TRY = "Try 7GB, 512MB, 50% or auto."


def parse_memory(memory: int | float | str) -> int | float | None:
    """Bytes (int), a share of the model (float), or None for `auto`.

    >>> [parse_memory(amount) for amount in ("7GB", "50%", 0.5, "auto")]
    [7000000000, 0.5, 0.5, None]

    Args:
        memory: A number with a unit (KB is 1000 bytes, KiB 1024), a share as 50% or
            0.5, bytes as a number alone, or `auto`.

    Raises:
        FlashError: If it is none of these, or a small number that lacks its unit.
    """
    if isinstance(memory, int) and memory > MAX_BYTES:
        return MAX_BYTES
    text = str(memory).strip().upper()
    if text == "AUTO":
        return None
    if isinstance(memory, float):
        text = f"{memory:f}"
    match = None if isinstance(memory, bool) else AMOUNT.fullmatch(text)
    if match is None or float(match[1]) <= 0:
        raise FlashError(f"{memory!r} is no amount of memory. {TRY}")
    number, unit = float(match[1]), match[2]
    if unit == "%":
        return min(number, MAX_BYTES) / 100
    if unit:
        number *= UNITS[unit if unit.endswith("B") else unit + "B"]
        return round(min(number, MAX_BYTES))
    if "." in text and number <= 1:
        return number
    if number < LEAST_BARE:
        raise FlashError(
            f"{memory} is an amount of memory without a unit. Try {number:g}GB, "
            f"{number:g}MB, or a share of the model such as 50%."
        )
    if number >= MAX_BYTES:
        return MAX_BYTES
    # Not by way of a float, which knows no more than 53 bits.
    return int(match[1].partition(".")[0])


def say_memory(nbytes: float) -> str:
    """The amount rounded up to three figures, as `parse_memory` reads it."""
    step = 10 ** max(len(str(int(nbytes))) - 3, 0)
    nbytes = int(-(-nbytes // step) * step)
    unit = "GB" if nbytes >= 10**9 else "MB" if nbytes >= 10**6 else "KB"
    return f"{nbytes / UNITS[unit]:g}{unit}"
