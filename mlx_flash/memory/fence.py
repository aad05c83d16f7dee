"""What was computed from slots last, and is perhaps not evaluated yet.

MLX is lazy: an array may be computed long after the call that made it. A slot must not
be read into before everything that multiplies from it was computed, whoever asked for
it. One fence serves all layers of a model and holds one result at a time, so that the
results of the other layers can go.
"""

import threading
from typing import Any

import mlx.core as mx

from ..errors import FlashError

TRANSFORMED = (
    "Training, gradients, mx.compile and mx.vmap do not go through FFNs on flash: "
    "which weights they need is known only while they are computed. Use the ordinary "
    "model for that: mlx_lm.load"
)


def evaluate(*results: Any) -> None:
    """`mx.eval`, which MLX refuses inside of its transformations.

    Raises:
        FlashError: If the arrays are traced by mx.compile or mx.vmap.
    """
    try:
        mx.eval(*results)
    except ValueError as error:
        raise FlashError(TRANSFORMED) from error


def begin(*results: Any) -> None:
    """`mx.async_eval`, refused for gradients, too; otherwise as `evaluate`."""
    try:
        mx.async_eval(*results)
    except ValueError as error:
        raise FlashError(TRANSFORMED) from error


class Fence:
    """Holds the last result that was computed from slots of a model.

    Attributes:
        lock: Held for the length of a step: one thread at a time uses the slots.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._held: Any = None
        self._owner: object = None

    def hold(self, result: Any, owner: object = None) -> None:
        """Start to compute `result` (arrays, a list of them, or None) and keep it.

        The one before is waited for first: until then somebody may hold what was made
        of it, a KV cache for example. MLX computes `result` meanwhile.

        Args:
            owner: Whose slots it was computed from.
        """
        begin(result)
        self.settle()
        self._held, self._owner = result, owner

    def settle(self, owner: object = None) -> None:
        """Wait until what is held was computed, and let go of it.

        Args:
            owner: Wait only for what was computed from the slots of this one, so that
                the result of the layer before can go on being computed.

        Raises:
            RuntimeError: If MLX fails to compute it. It is let go of all the same:
                it would fail for ever.
        """
        if owner is not None and self._owner is not owner:
            return
        try:
            mx.eval(self._held)
        except RuntimeError:
            self._held = None
            raise
        self._held = None
