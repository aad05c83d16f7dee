"""FFNs with exact zeros: of every token only the neurons it needs are read.

Shapes: T tokens (batch and length together), D model width, N neurons, K read.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..memory.fence import evaluate
from ..memory.slot_cache import Wave
from .base import chosen_units
from .predictor import Predictor
from .slot_ffn import SlotFFN

# From this many tokens at once all neurons are read in order: the union of what they
# need is then most of the layer, and long reads are several times faster per byte.
SWEEP_TOKENS = 4


class NeuronFFN(SlotFFN):
    """An FFN module over the neurons that are needed, its hidden zeros left out.

    The predictor says which ones, token by token: what a token gets does not depend on
    its neighbours or on what the slots happen to hold. Without a predictor, for
    `sweep_tokens` or more at once, and in a layer that is resident as a whole, every
    neuron is computed.
    """

    # Below half of the slots what is wanted is gathered; above, `_cover` multiplies all
    # slots where they lie, and none of them may be read into meanwhile.
    apart = 0.5

    def __init__(self, ffn: nn.Module, predictor: Predictor | None = None):
        super().__init__(ffn)
        if predictor is not None:
            self.predictor = predictor
        self.sweep_tokens = SWEEP_TOKENS

    def stream(self, x: mx.array) -> mx.array:
        chosen = self.predictor(x) if "predictor" in self else None
        if chosen is None or len(x) >= self.sweep_tokens:
            return self.sweep(x, chosen)
        return self.decode(x, chosen)

    def sweep(self, x: mx.array, chosen: mx.array | None) -> mx.array:
        """Every neuron of the layer, in the order it has on flash.

        Args:
            chosen: bool [T, N], what a predictor would have chosen, or None. Recall is
                counted by it, since the truth is known here; and what the last token
                needs stays in memory, because the next one will need much of it.
        """
        slots = self.slots
        keep = None
        if chosen is not None:
            evaluate(chosen)
            keep = np.flatnonzero(np.asarray(chosen[-1]))

        def multiply(total: mx.array | None, wave: Wave) -> mx.array:
            rows, units, wanted = self._cover(wave)

            def through(h: mx.array) -> mx.array:
                if chosen is not None:
                    self._count_recall(h, chosen[:, units], wanted)
                return h if wanted is None else mx.where(wanted, h, 0)

            y = self.compute(x, self.slots.parts, rows, units, through)
            return _add(total, y)

        y = slots.run(np.arange(slots.units), multiply, len(x), keep)
        assert y is not None  # a layer has units
        return y

    def decode(self, x: mx.array, chosen: mx.array) -> mx.array:
        """Each token's own neurons; `chosen` is bool [T, N]."""
        guess = self.guess_next(x)
        # The one point where the host waits for MLX: it must know what to read.
        evaluate(chosen, guess)
        needed = chosen_units(chosen)

        def multiply(total: mx.array | None, wave: Wave) -> mx.array:
            rows, units, wanted = self._cover(wave)
            if len(x) > 1:
                mine = chosen[:, units]
                wanted = mine if wanted is None else wanted & mine
            masked = wanted

            def through(h: mx.array) -> mx.array:
                return h if masked is None else mx.where(masked, h, 0)

            y = self.compute(x, self.slots.parts, rows, units, through)
            return _add(total, y)

        y = self.slots.run(
            needed, multiply, len(x), meanwhile=lambda: self.read_next(guess)
        )
        return mx.zeros_like(x) if y is None else y

    def _cover(self, wave: Wave) -> tuple[mx.array | None, mx.array, mx.array | None]:
        """(slots, their units, which of them count) to multiply for a wave.

        Gathering copies rows. When most slots are wanted, all are multiplied where
        they lie and the results of the others are dropped.
        """
        slots = self.slots
        if 2 * len(wave.slots) <= slots.n_slots:
            return mx.array(wave.slots, mx.uint32), mx.array(wave.units), None
        wanted = np.zeros(slots.n_slots, bool)
        wanted[wave.slots] = True
        units = mx.array(np.maximum(slots.cache.unit_of, 0))
        return None, units, None if wanted.all() else mx.array(wanted)

    def _count_recall(
        self, h: mx.array, chosen: mx.array, wanted: mx.array | None
    ) -> None:
        active = h != 0 if wanted is None else (h != 0) & wanted
        stats = self.slots.stats
        stats.swept_active += int(active.sum())
        stats.swept_predicted += int((active & chosen).sum())


def _add(total: mx.array | None, part: mx.array) -> mx.array:
    """The sum over waves; of more than one, in float32."""
    return part if total is None else total.astype(mx.float32) + part
