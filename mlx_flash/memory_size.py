"""Amounts of memory as people write them."""

import re

from .errors import FlashError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
MAX_BYTES = 10**18  # more is said by mistake, and would not fit a float


def parse_memory(memory: int | str) -> int | float | None:
    """Bytes (int), a share of the model (float), or None for `auto`.

    >>> parse_memory("7GB"), parse_memory("50%"), parse_memory("auto")
    (7000000000, 0.5, None)

    Raises:
        FlashError: If it is none of these.
    """
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return min(memory, MAX_BYTES)
    text = str(memory).strip().upper()
    if text == "AUTO":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[KMGT]?B|[KMGT]|)", text)
    if match and float(match[1]) > 0:
        number, unit = float(match[1]), match[2]
        if unit == "%":
            return min(number, MAX_BYTES) / 100
        number *= UNITS[unit if unit in UNITS else unit + "B"]
        return round(min(number, MAX_BYTES))
    raise FlashError(f"{memory!r} is no amount of memory. Try 7GB, 512MB, 50% or auto.")


def say_memory(nbytes: float) -> str:
    """The amount rounded up to three figures, as `parse_memory` reads it."""
    step = 10 ** max(len(str(int(nbytes))) - 3, 0)
    nbytes = int(-(-nbytes // step) * step)
    unit = "GB" if nbytes >= 10**9 else "MB" if nbytes >= 10**6 else "KB"
    return f"{nbytes / UNITS[unit]:g}{unit}"
