"""What every FFN on flash has in common: its slots, and the layer after it.

Shapes: T tokens, n units of a layer, K units of each token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import FlashError
from ..memory.fence import evaluate
from ..memory.footprint import MAX_BATCH
from ..memory.slots import CLOSED, UnitSlots
from ..memory.trial import Trial
from .foresight import Foresight
from .part import ALL, Part

# x, and how many units each token takes where the kind has such a number → a choice:
# bool [T, n], float32 scores [T, n], or unit ids of any shape.
Guess = Callable[[mx.array, int], mx.array]
# x [T, D] of a call, and its choice: unit ids [T, K].
Watcher = Callable[[mx.array, mx.array], None]


@dataclass(frozen=True)
class LookAhead:
    """The next layer, and how to guess from this layer's input what it will need.

    Attributes:
        trial: Says whether to guess at all; None where somebody wants it always.
        first: Whether this layer is the model's first, with which a token begins.
    """

    layer: FlashFFN
    guess: Guess
    trial: Trial | None = None
    first: bool = False


class FromFlash(nn.Module):
    """A module whose weights are in slots, not in the module.

    It stands in a model where the ordinary one stood. The slots are attached after the
    model was built and detached when it is closed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._slots: UnitSlots | None = None

    @property
    def slots(self) -> UnitSlots:
        """The slots that are attached.

        Raises:
            FlashError: If the model was closed.
        """
        if self._slots is None:
            raise FlashError(CLOSED)
        return self._slots

    def attach(self, slots: UnitSlots, batch_tokens: int = MAX_BATCH) -> None:
        """Take weights from `slots` from now on."""
        self._slots = slots

    def detach(self) -> None:
        """Let go of the slots. Calls then raise a FlashError."""
        if self._slots is not None:
            self._slots.close()
            self._slots = None


class FlashFFN(FromFlash):
    """An FFN module whose weights are in slots.

    Attributes:
        apart: For `SlotCache`: up to which share of the slots a step is cut in two.
        batch_tokens: How many tokens are multiplied at once. A prompt chunk has more:
            they go through every wave batch by batch, so that hidden values take the
            same memory however long the chunk is.
        part: Which of the layer's units the slots are for.
    """

    apart = 0.0
    batch_tokens = MAX_BATCH
    part: Part = ALL
    foresight: Foresight | None = None

    @property
    def sparse(self) -> bool:
        """Whether a few tokens need some units alone, where more are given them all."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self._ahead: LookAhead | None = None
        self._watcher: Watcher | None = None

    def attach(self, slots: UnitSlots, batch_tokens: int = MAX_BATCH) -> None:
        super().attach(slots)
        self.batch_tokens = batch_tokens

    def batches(self, x: mx.array) -> list[mx.array]:
        """x [T, …] in as few pieces of about the same length as may be."""
        count = -(-len(x) // self.batch_tokens)
        if count < 2:
            return [x]
        cuts = [len(x) * i // count for i in range(1, count)]
        return list(mx.split(x, cuts))

    def look_ahead(
        self,
        layer: FlashFFN,
        guess: Guess,
        trial: Trial | None = None,
        first: bool = False,
    ) -> None:
        """Begin to read what `layer`, the next one, will need by the `guess` of it.

        `trial` and `first` are those of `LookAhead`.
        """
        self._ahead = LookAhead(layer, guess, trial, first)

    def foresee(self, foresight: Foresight) -> None:
        """Tell the policy from now on which units will be wanted soon."""
        hide(self, "foresight", foresight)

    def expected(self, x: mx.array) -> mx.array | None:
        """What `foresight` expects of the tokens after x [T, D]; lazy."""
        if self.foresight is None or self.part.shared:
            return None
        return self.foresight.expected(x)

    def watch(self, watcher: Watcher | None) -> None:
        """Have `watcher` told of every call's input and of what it chose."""
        self._watcher = watcher

    def guess_next(self, x: mx.array, per_token: int = 0) -> mx.array | None:
        """The choice that the next layer would make if its input were x; lazy."""
        if self._ahead is None:
            return None
        if (trial := self._ahead.trial) is not None:
            if self._ahead.first:
                trial.next_token()
            if not trial.on:
                return None
        slots = self._ahead.layer._slots
        if slots is None or slots.holds_all:
            return None
        return self._ahead.guess(x, per_token)

    def read_next(self, guess: mx.array | None) -> None:
        """Begin to read what an evaluated guess names."""
        if guess is None or self._ahead is None:
            return
        layer = self._ahead.layer
        units = layer.part.here(chosen_units(guess))
        units = units[units < layer.slots.units]
        likely = None
        if mx.issubdtype(guess.dtype, mx.floating) and not layer.part.shared:
            likely = 1 / (1 + np.exp(-np.asarray(guess).max(axis=0)))
        layer.slots.read_early(units, likely)


def chosen_units(choice: mx.array) -> np.ndarray:
    """The unit ids, sorted and unique, that an evaluated choice names.

    Args:
        choice: bool [T, n], scores [T, n] that are above zero for those that are
            meant, or ids of any shape.
    """
    named = np.asarray(choice)
    if np.issubdtype(named.dtype, np.floating):
        named = named > 0
    if named.dtype == bool:
        return np.flatnonzero(named.any(axis=0))
    return np.unique(named).astype(np.intp)


class NoSuchWeight:
    """Refuses, by name, to take weights that are on flash. Comes before nn.Module.

    `update`, `load_weights` and adapters would pass over names that a module does not
    have, and nothing would tell that they had no effect.
    """

    on_flash: frozenset[str] = frozenset()

    def __contains__(self, name: object) -> bool:
        found = super().__contains__(name)  # type: ignore[misc]
        if name in self.on_flash and not found:
            raise FlashError(
                f"{name} cannot be changed: the weights of this module are on flash. "
                "Change the ordinary model (mlx_lm.fuse for adapters) and convert it."
            )
        return found


def each(pieces: Sequence[Any], compute: Callable[[int, Any], mx.array]) -> list:
    """`compute(i, piece)` of every piece, one after the other.

    Several are evaluated one by one: what is computed for one is gone before the next.
    """
    results = []
    for i, piece in enumerate(pieces):
        results.append(compute(i, piece))
        if len(pieces) > 1:
            evaluate(results[-1])
    return results


def join(pieces: list[mx.array]) -> mx.array:
    """Pieces [t, …] as one array [T, …]. The list is emptied: it holds them no more."""
    y = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)
    pieces.clear()
    return y


def hide(module: nn.Module, name: str, value: nn.Module) -> None:
    """Give a module an attribute that is no child of it.

    MLX finds children in every attribute that is a module, also private ones, and would
    save, cast or quantise them.
    """
    object.__setattr__(module, name, value)


def with_children(module: nn.Module, children: Mapping[str, Any]) -> nn.Module:
    """A shallow copy of a module that has other children or arrays.

    The copy is made for one call and dropped: what it multiplies with is held by
    nobody afterwards. It takes about a microsecond.
    """
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    dict.update(copy, module)
    dict.update(copy, children)
    return copy


def given(values: mx.array) -> Callable[[mx.array], mx.array]:
    """Stands in for a projection of which is known what it gives."""
    return lambda x: values
