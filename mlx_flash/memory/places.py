"""Which slot each unit is in: an array, or a dictionary where units are very many."""

from typing import Any

import numpy as np

from .policies import EMPTY

MANY = 1 << 20  # units, whose array would take 8 MB


class FewPlaces:
    """The slot of each of many units, few of which have one.

    It is used as the array would be: with arrays of units, or for all of them at once.
    An entry of the array takes 8 bytes, so for the ten million rows of a table of
    n-grams that would be more than all of its slots.
    """

    def __init__(self, units: int):
        self._units = units
        self._slots: dict[int, int] = {}

    def __len__(self) -> int:
        return self._units

    def __getitem__(self, units: np.ndarray) -> np.ndarray:
        found = (self._slots.get(unit, EMPTY) for unit in units.tolist())
        return np.fromiter(found, np.intp, len(units))

    def __setitem__(self, units: np.ndarray | slice, slots: np.ndarray | int) -> None:
        if isinstance(units, slice):  # of all units: none has a slot any more
            self._slots.clear()
        elif isinstance(slots, np.ndarray):
            self._slots.update(zip(units.tolist(), slots.tolist(), strict=True))
        else:  # EMPTY
            for unit in units.tolist():
                self._slots.pop(unit, None)


def make_places(units: int, slots: int) -> Any:
    """An array, or what is used as one: no unit is in any of so many slots."""
    if slots < units > MANY:
        return FewPlaces(units)
    # Indices of the machine's own width: NumPy converts any other on every use.
    return np.full(units, EMPTY, np.intp)
