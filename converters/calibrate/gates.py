"""Find each layer's thresholds for skipping neurons, and measure what skipping costs.

On calibration text each neuron gets its gain, the root mean square of its up value, and
a layer's thresholds are quantiles of |act(g)| times the gain. Other text is taken
through the model several times side by side, once for each share to measure, with every
token skipping, as in a run.
Shapes: S shares measured, n sequences, L their length, D model width, N neurons.
"""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...layers.base import given, with_children
from ...layers.gated import activations, loud
from ...layers.projections import known_projections
from ...storage.manifest import Calibration
from ...storage.skipping import MEASURED, SHARES, Skipping
from ..arrays import release
from ..options import ConvertOptions
from .calibrator import Calibrator, as_stored
from .fit import split
from .layerwise import Recorder

MOST_VALUES = 4_000_000  # gates of a layer from which its quantiles are taken


class GateCalibrator(Calibrator):
    """One conversion's thresholds, layer by layer. It fits no predictors."""

    held_out: np.ndarray  # [S, n, L, D], what the next layer gets; `resume` sets it

    @property
    def _fitted(self) -> int:
        """Sequences that thresholds are made from: the first ones of the text."""
        fitted = split(self.tokens.size, self.tokens.shape[1])[0]
        return fitted.stop // self.tokens.shape[1]

    @property
    def _measured(self) -> np.ndarray:
        """The others; all, where the text is too short to hold any back."""
        return self.tokens[self._fitted % len(self.tokens) :]

    def resume(self, done: int) -> None:
        if done:
            self.hidden = self.work.load_array(f"hidden_{done:02d}.npy")
            self.held_out = self.work.load_array(f"held_out_{done:02d}.npy")
            return
        self.hidden = self.model.embed_text(self.tokens[: self._fitted])
        states = self.model.embed_text(self._measured)
        self.held_out = np.stack([states] * len(MEASURED))

    def fit_thresholds(self, index: int) -> tuple[float, ...]:
        """Take all text through a layer; a threshold for each of `SHARES`."""
        path = self.paths[index]
        layer = self.model.load_layer(index)
        ffn = self.model.module(path)
        ffn.set_dtype(self.dtype)
        gates = gate_packing(self.options, ffn)
        as_stored(ffn, self.options.packing, self.model.dtype, gates)
        recorder = Recorder(ffn)
        tokens = self.tokens[: self._fitted]
        self.model.walk(index, path, recorder, self.hidden, tokens)
        gains, thresholds = _fit(ffn, np.concatenate(recorder.inputs))
        every = Skipping(SHARES, MEASURED, (), 0)
        for share, states in zip(MEASURED, self.held_out, strict=True):
            threshold = every.threshold(thresholds, share)
            skips = _Skips(ffn, gains, threshold) if share else ffn
            self.model.walk(index, path, skips, states, self._measured)
        release(layer)
        self.work.save_array(f"gains_{index:02d}.npy", np.array(gains))
        self.work.save_array(f"hidden_{index + 1:02d}.npy", self.hidden)
        self.work.save_array(f"held_out_{index + 1:02d}.npy", self.held_out)
        return thresholds

    def gains(self, index: int) -> mx.array:
        """Of a layer that was fitted, [N] float32."""
        return mx.array(self.work.load_array(f"gains_{index:02d}.npy"))

    def finish(self, index: int) -> None:
        super().finish(index)
        self.work.drop(f"held_out_{index:02d}.npy")

    def facts(self) -> Calibration:
        file = super().facts().text
        return Calibration(file, self.tokens.size, self._measured.size)

    def measure(self) -> Skipping:
        """What skipping costs, now that all layers have been run."""
        self.model.load_outer()
        tokens = self._measured
        perplexity = []
        for states in self.held_out:
            loss = 0.0
            for row, h in zip(tokens, states, strict=True):
                loss += self._loss(mx.array(row[None]), mx.array(h[None]))
            perplexity.append(math.exp(loss / (tokens.size - len(tokens))))
        release(self.model.model)
        return Skipping(SHARES, MEASURED, tuple(perplexity), tokens.size)

    def _loss(self, tokens: mx.array, h: mx.array) -> float:
        """The log of one over the probability of all tokens [1, L] but the first."""
        logits = self.model.logits(h.astype(self.model.dtype), tokens)
        losses = nn.losses.cross_entropy(
            logits[0, :-1].astype(mx.float32), tokens[0, 1:], reduction="sum"
        )
        return float(losses)


def gate_packing(options: ConvertOptions, ffn: nn.Module) -> dict | None:
    """How resident gates are quantised: as the bundles, else as what is resident."""
    (gate, *_), _ = known_projections(ffn)
    packing = options.packing or options.resident_packing
    if packing and ffn[gate].weight.shape[-1] % packing["group_size"]:
        return None  # what has such rows stays as it is in the whole model
    return packing


class _Skips(nn.Module):
    """Stands in for an FFN, and skips neurons."""

    def __init__(self, ffn: nn.Module, gains: mx.array, threshold: float):
        super().__init__()
        self.ffn, self.gains = ffn, gains
        (gate, up), out = known_projections(ffn)
        self._names = gate, up, out
        self._threshold = threshold

    def __call__(self, x: mx.array) -> mx.array:
        gate = self._names[0]
        gates = self.ffn[gate](x)
        gates = loud(self.ffn, self._names, gates, self.gains, self._threshold)
        return with_children(self.ffn, {gate: given(gates)})(x)


def _fit(ffn: nn.Module, inputs: np.ndarray) -> tuple[mx.array, tuple[float, ...]]:
    """Gains [N], and thresholds that rise from 0, for x [T, D], float32."""
    (gate, up), out = known_projections(ffn)
    rows = max(MOST_VALUES // len(ffn[gate].weight), 1)
    some = mx.array(inputs[:: max(len(inputs) // rows, 1)])
    x = some.astype(ffn[up].weight.dtype)
    gains = mx.sqrt(mx.mean(mx.square(ffn[up](x).astype(mx.float32)), axis=0))
    said = mx.abs(activations(ffn, (gate, up, out), ffn[gate](x))) * gains
    found = np.quantile(np.array(said.astype(mx.float32)).ravel(), SHARES[1:])
    return gains, (0.0, *(float(value) for value in found))
