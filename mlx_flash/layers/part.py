"""Which of a layer's units are on this machine: all, or a share beside other machines.

Slots and reads count the units that are here; routers, predictors and biases count all
of them. An FFN turns one number into the other by its part, and adds up what all
machines computed.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np


class Part:
    """All units of a layer, on one machine.

    Attributes:
        shared: Whether other machines have some of them.
    """

    shared = False

    def places(self, units: np.ndarray) -> np.ndarray:
        """The numbers here of units of the whole layer, -1 for those elsewhere."""
        return units

    def all_numbers(self, here: np.ndarray) -> np.ndarray:
        """The numbers in the whole layer of units that are numbered here."""
        return here

    def here(self, units: np.ndarray) -> np.ndarray:
        """The numbers here of those units of the whole layer that are here, sorted."""
        return units

    def total(self, here: int) -> int:
        """Units of the whole layer, of which so many are here."""
        return here

    def agreed(self, choice: mx.array) -> mx.array:
        """The units that all machines take as chosen, where they could differ."""
        return choice

    def sum(self, y: mx.array) -> mx.array:
        """What all machines computed, from what this one did."""
        return y


class Share(Part):
    """Some units of a layer.

    Args:
        units: Their numbers in the whole layer, sorted.
        total: Units of the whole layer.
        add: Adds up an array over all machines.
        agree: Makes the choice of one machine that of all; None where all choose alike.
    """

    shared = True

    def __init__(
        self,
        units: np.ndarray,
        total: int,
        add: Callable[[mx.array], mx.array],
        agree: Callable[[mx.array], mx.array] | None = None,
    ):
        self.units = units
        self._places = np.full(total, -1, np.intp)
        self._places[units] = np.arange(len(units))
        self._add = add
        self._agree = agree

    def places(self, units: np.ndarray) -> np.ndarray:
        return self._places[units]

    def all_numbers(self, here: np.ndarray) -> np.ndarray:
        return self.units[here]

    def here(self, units: np.ndarray) -> np.ndarray:
        places = self._places[units]
        return places[places >= 0]

    def total(self, here: int) -> int:
        return len(self._places)

    def agreed(self, choice: mx.array) -> mx.array:
        return choice if self._agree is None else self._agree(choice)

    def sum(self, y: mx.array) -> mx.array:
        return self._add(y)


ALL = Part()
