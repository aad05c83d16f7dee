"""FFNs with exact zeros: of every token only the neurons it needs are read.

Shapes: T tokens (batch and length together), D model width, N neurons, K read.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import FlashError
from ..memory.slot_cache import Wave
from ..memory.slots import CLOSED, UnitSlots
from .predictor import Predictor
from .projections import SlotFFN

# From this many tokens at once all neurons are read in order: the union of what they
# need is then most of the layer, and long reads are several times faster per byte.
SWEEP_TOKENS = 4


class NeuronFFN(SlotFFN):
    """An FFN module over the neurons that are needed, its hidden zeros left out.

    Which are needed says the predictor, token by token: what a token gets does not
    depend on its neighbours or on what the slots happen to hold. Without a predictor,
    for `sweep_tokens` or more at once, and in a layer that is resident as a whole,
    every neuron is computed.
    """

    # Below half of the slots what is wanted is gathered; above, `_cover` multiplies all
    # slots where they lie, and none of them may be read into meanwhile.
    apart = 0.5

    def __init__(self, ffn: nn.Module, predictor: Predictor | None = None):
        super().__init__(ffn)
        if predictor is not None:
            self.predictor = predictor
        self.store: UnitSlots | None = None  # given by load, taken by close
        self.sweep_tokens = SWEEP_TOKENS
        self._next: NeuronFFN | None = None

    def look_ahead(self, layer: NeuronFFN) -> None:
        """Read early what `layer`, the next one, will need, judged by our own input."""
        self._next = layer

    def __call__(self, x: mx.array) -> mx.array:
        tokens = x.reshape(-1, x.shape[-1])
        if self.store is None:
            raise FlashError(CLOSED)
        if self.store.holds_all:
            y = self.compute(tokens, self.store.parts, None)
        else:
            y = self._stream(tokens)
        return self.add_bias(y).astype(x.dtype).reshape(x.shape)

    def _stream(self, x: mx.array) -> mx.array:
        """Sum over waves of neurons; more than one wave is summed in float32."""
        store, T = self.store, x.shape[0]
        chosen = self.predictor(x) if "predictor" in self else None
        swept, keep = chosen is None or T >= self.sweep_tokens, None
        guess = None if swept else self._guess(x)
        if swept:
            needed = np.arange(store.units, dtype=np.int32)
            if chosen is not None:  # the next token needs what the last one does
                keep = np.flatnonzero(np.asarray(chosen[-1]))
        else:
            # The one point where the host waits for MLX: it must know what to read.
            mx.eval([chosen] if guess is None else [chosen, guess])
            needed = np.flatnonzero(np.asarray(chosen.any(axis=0))).astype(np.int32)
        y = None
        for wave in store.fetch(needed, T, keep):
            if guess is not None:  # queued behind what this layer waits for
                early, guess = np.flatnonzero(np.asarray(guess.any(axis=0))), None
                self._next.store.read_early(early)
            slots, units, valid = self._cover(wave)

            def through(h, units=units, valid=valid):
                if swept and chosen is not None:
                    self._compare(h, chosen[:, units], valid)
                if not swept and T > 1:
                    mine = chosen[:, units]
                    valid = mine if valid is None else valid & mine
                return h if valid is None else mx.where(valid, h, 0)

            part = self.compute(x, store.parts, slots, units, through)
            y = part if y is None else y.astype(mx.float32) + part
            store.in_use = y
        return mx.zeros_like(x) if y is None else y

    def _guess(self, x: mx.array) -> mx.array | None:
        """What the next layer would choose, were its input this layer's."""
        following = self._next
        if following is None or following.store is None or following.store.holds_all:
            return None
        return following.predictor(x) if "predictor" in following else None

    def _cover(self, wave: Wave):
        """(slots, units, which count) to multiply for a wave.

        Gathering copies rows. When most slots are wanted, all are multiplied where
        they lie and the others' results are dropped.
        """
        store = self.store
        if 2 * len(wave.slots) <= store.n_slots:
            return mx.array(wave.slots), mx.array(wave.units), None
        wanted = np.zeros(store.n_slots, bool)
        wanted[wave.slots] = True
        units = mx.array(np.maximum(store.cache.unit_of, 0))
        return None, units, None if wanted.all() else mx.array(wanted)

    def _compare(self, h: mx.array, chosen: mx.array, valid) -> None:
        active = h != 0 if valid is None else (h != 0) & valid
        stats = self.store.stats
        stats.swept_active += int(active.sum())
        stats.swept_predicted += int((active & chosen).sum())
