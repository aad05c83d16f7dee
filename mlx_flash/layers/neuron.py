"""FFNs over neurons: of every token only those that it needs are read.

Shapes: T tokens (batch and length together), D model width, N neurons, K read.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..memory.slot_cache import Wave
from .base import chosen_units, each, join
from .predictor import Predictor
from .slot_ffn import Arrays, SlotFFN, add

# From this many tokens at once all neurons are read in order: the union of what they
# need is then most of the layer, and long reads are several times faster per byte.
SWEEP_TOKENS = 4
# Rows are gathered in multiples of this. In a simulation of OPT-6.7B with MLX's own
# buffer cache, 52 of 32,764 arrays then needed new memory, before 29,880.
ROUND_ROWS = 128


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

    @property
    def sparse(self) -> bool:
        return "predictor" in self

    def chosen(self, x: mx.array, known: Arrays) -> mx.array:
        """bool [T, N]: which neurons each of the tokens x [T, D] needs.

        Asked only where the layer is sparse.

        Args:
            known: What `known` gave for x.
        """
        return self.predictor(x)

    def stream(self, batches: list[mx.array]) -> mx.array:
        tokens = sum(map(len, batches))
        if not self.sparse or tokens >= self.sweep_tokens:
            return self.sweep(batches, tokens)
        return self.decode(join(batches))

    def sweep(self, batches: list[mx.array], tokens: int) -> mx.array:
        """Every neuron of the layer, in the order it has on flash.

        The truth is known here, so a predictor's recall is counted by its choice for
        the last batch. And what the last token needs stays in memory, because the next
        one will need much of it.
        """
        slots, last = self.slots, len(batches) - 1
        known = [self.known(x) for x in batches]
        chosen = keep = None
        if self.sparse:
            chosen = self.chosen(batches[last], known[last])
            slots.wait_for(chosen)
            keep = self.part.here(np.flatnonzero(np.asarray(chosen[-1])))
        found: list[mx.array] = []
        counting = "predictor" in self

        def multiply(totals: list[mx.array] | None, wave: Wave) -> list[mx.array]:
            rows, units, wanted = self._cover(wave)

            def compute(i: int, x: mx.array) -> mx.array:
                def through(h: mx.array) -> mx.array:
                    if counting and chosen is not None and i == last:
                        found.append(_recalled(h, chosen[:, units], wanted))
                    return h if wanted is None else mx.where(wanted, h, 0)

                part = self.compute(x, slots.parts, rows, units, through, known[i])
                return add(totals[i] if totals else None, part)

            return each(batches, compute)

        y = slots.run(np.arange(slots.units), multiply, tokens, keep, None, self.finish)
        if found:
            active, predicted = np.asarray(sum(found)).tolist()
            slots.stats.swept_active += active
            slots.stats.swept_predicted += predicted
        return y

    def decode(self, x: mx.array) -> mx.array:
        """The neurons that are chosen for each of a few tokens x [T, D]."""
        known = self.known(x)
        chosen, guess = self.chosen(x, known), self.guess_next(x)
        self.slots.wait_for(chosen, guess)
        needed = self.part.here(chosen_units(chosen))

        def multiply(totals: list[mx.array] | None, wave: Wave) -> list[mx.array]:
            rows, units, wanted = self._cover(wave)
            if len(x) > 1:
                mine = chosen[:, units]
                wanted = mine if wanted is None else wanted & mine
            masked = wanted

            def through(h: mx.array) -> mx.array:
                return h if masked is None else mx.where(masked, h, 0)

            part = self.compute(x, self.slots.parts, rows, units, through, known)
            return [add(totals[0] if totals else None, part)]

        y = self.slots.run(
            needed,
            multiply,
            len(x),
            meanwhile=lambda: self.read_next(guess),
            finish=self.finish,
        )
        return self.finish([mx.zeros_like(x)]) if y is None else y

    def _cover(self, wave: Wave) -> tuple[mx.array | None, mx.array, mx.array | None]:
        """(slots, their units in the whole layer, which count) to multiply for a wave.

        Gathering copies rows, in round numbers of them: MLX can use a freed buffer
        again only for an array of nearly the same size. When most slots are wanted,
        all are multiplied where they lie and the results of the others are dropped.
        """
        slots, count = self.slots, len(wave.slots)
        step = max(min(ROUND_ROWS, slots.n_slots // 8), 1)
        rounded = -(-count // step) * step
        if 2 * rounded <= slots.n_slots:
            wanted = None
            if rounded > count:
                wanted = mx.arange(rounded) < count
            rows = mx.array(np.resize(wave.slots, rounded).astype(np.uint32))
            units = self.part.all_numbers(np.resize(wave.units, rounded))
            return rows, mx.array(units), wanted
        marks = np.zeros(slots.n_slots, bool)
        marks[wave.slots] = True
        held = self.part.all_numbers(np.maximum(slots.cache.unit_of, 0))
        return None, mx.array(held), None if marks.all() else mx.array(marks)


def _recalled(h: mx.array, chosen: mx.array, wanted: mx.array | None) -> mx.array:
    """(active neurons, those of them that were predicted) of hidden values h."""
    active = h != 0 if wanted is None else (h != 0) & wanted
    return mx.stack([active.sum(), (active & chosen).sum()])
