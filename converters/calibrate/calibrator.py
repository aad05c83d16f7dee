"""Take calibration text through a model, and fit a predictor to every layer's FFN.

All that an interrupted conversion needs to go on lies in its work folder: the tokens,
the hidden states that the next layer gets, each finished layer's predictor and order.
Shapes: D model width, N neurons.
"""

from functools import cached_property
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...layers.dense import hidden_values
from ...layers.predictor import Predictor, default_rank
from ...layers.projections import from_neurons, neuron_rows, pack
from ...storage.manifest import Calibration, PredictorFacts
from ..arrays import load_arrays, release
from ..conversion import Job
from ..packings import Packings
from ..resident import write_weights
from . import text
from .fit import fit_predictor, split
from .layerwise import LayerwiseModel
from .placement import order_by_coactivation

MEASURED_TOKENS = 1024
ORDER_TOKENS = 4096  # of the calibration text, to see which neurons go together


class Calibrator:
    """One conversion's calibration, layer by layer.

    Args:
        paths: Of the FFNs, one a layer.
        dtype: Of the predictors, and of the FFNs on flash.
        packings: How these are packed there.
    """

    hidden: np.ndarray  # what the next layer gets; `resume` sets it

    def __init__(
        self,
        job: Job,
        model: LayerwiseModel,
        paths: list[str],
        dtype: mx.Dtype,
        packings: Packings,
    ):
        self.job = job
        self.work = job.work
        self.options = job.options
        self.model = model
        self.paths = paths
        self.dtype = dtype
        self.packings = packings

    @cached_property
    def tokens(self) -> np.ndarray:
        """The text, int32 [sequences, length]; a resumed run reads the same."""
        name = "tokens.npy"
        if name not in self.work.digests:
            count = self.options.calibration_tokens
            if file := self.options.calibration:
                path = Path(file).expanduser()
                tokens = text.text_tokens(self.model.source, path, count)
            else:
                tokens = text.sample_tokens(self.model, count, self.job.bars)
            self.work.save_array(name, tokens)
            self.work.record()
        return self.work.load_array(name)

    def active_share(self) -> float:
        """The share of hidden values that are not zero, on some of the text."""
        tokens = self.tokens[: max(MEASURED_TOKENS // self.tokens.shape[1], 1)]
        hidden = self.model.embed_text(tokens)
        shares = []
        for index in self.job.bars(range(len(self.paths)), "measuring", unit="layer"):
            path = self.paths[index]
            inputs = mx.array(self.model.run_text(index, path, hidden, tokens))
            ffn = self.model.load_module(path)
            h = hidden_values(ffn, inputs.astype(self.model.dtype))
            shares.append(float(mx.mean(h != 0)))
            release(ffn)
        return sum(shares) / len(shares)

    def resume(self, done: int) -> None:
        """Bring the states that layer `done` gets."""
        if done:
            self.hidden = self.work.load_array(f"hidden_{done:02d}.npy")
        else:
            self.hidden = self.model.embed_text(self.tokens)

    def fit(self, index: int) -> PredictorFacts:
        """Take the text through a layer; store its predictor and its neurons' order."""
        path = self.paths[index]
        asked = self.options
        length = self.tokens.shape[1]
        inputs = self.model.run_text(index, path, self.hidden, self.tokens)
        ffn = self.model.load_module(path, self.dtype)
        self._as_stored(path, ffn)
        rank = asked.rank or default_rank(index, len(self.paths), inputs.shape[1])
        arrays, facts = fit_predictor(
            inputs,
            ffn,
            self.dtype,
            length,
            rank,
            asked.threshold,
            asked.recall,
            asked.fit_steps,
            seed=index,
        )
        release(ffn)
        if asked.order == "coactivation":
            order = _order_by_use(arrays, facts, inputs)
            self.work.save_array(f"order_{index:02d}.npy", order)
            for name, array in arrays.items():
                if not name.startswith("reduce."):  # the others have a row a neuron
                    arrays[name] = array[mx.array(order)]
        named = {f"{path}.predictor.{k}": w for k, w in arrays.items()}
        name = f"predictor_{index:02d}.safetensors"
        self.work.digests[name] = write_weights(self.work.path(name), named).sha256
        self.work.save_array(f"hidden_{index + 1:02d}.npy", self.hidden)
        return facts

    def order(self, index: int) -> mx.array | None:
        """Place i on flash is for neuron `order[i]`; None: as in the checkpoint."""
        if self.options.order == "checkpoint":
            return None
        return mx.array(self.work.load_array(f"order_{index:02d}.npy"))

    def finish(self, index: int) -> None:
        """Drop what only a layer that is done by now needed."""
        self.work.drop(f"hidden_{index:02d}.npy")

    def predictors(self) -> dict[str, mx.array]:
        """The arrays of all layers' predictors, lazily, by their paths in the model."""
        arrays: dict[str, mx.array] = {}
        for index in range(len(self.paths)):
            name = f"predictor_{index:02d}.safetensors"
            arrays |= load_arrays(self.work.sound(name))
        return arrays

    def facts(self) -> Calibration:
        file, tokens = self.options.calibration, self.tokens
        held_out = split(tokens.size, tokens.shape[1])[2]
        return Calibration(
            text=Path(file).name if file else "sampled",
            tokens=tokens.size,
            held_out_tokens=held_out.stop - held_out.start,
        )

    def _as_stored(self, path: str, ffn: nn.Module) -> None:
        """Give an FFN the values its bundles have, in float32."""
        *ins, out = known = self.packings.unpacked(path, ffn)
        for name in ins:
            ffn[name].weight = from_neurons(ffn, name, known[name])
        ffn[out].weight = known[out].T
        ffn.set_dtype(mx.float32)


def as_stored(
    ffn: nn.Module,
    packing: dict | None,
    dtype: mx.Dtype,
    gate_packing: dict | None = None,
) -> None:
    """Give an FFN the values that a folder has of it, as `dtype`.

    Args:
        packing: Of its projections.
        gate_packing: Of the first one, where `packing` is None.
    """
    packings = [packing or gate_packing, *[packing] * 2]
    for (name, rows), how in zip(neuron_rows(ffn).items(), packings, strict=False):
        if how:
            packed = pack(rows, how)
            weight, scales = packed["weight"], packed["scales"]
            rows = mx.dequantize(weight, scales, packed.get("biases"), **how)
        if rows.shape != ffn[name].weight.shape:
            rows = rows.T
        ffn[name].weight = rows
    ffn.set_dtype(dtype)


def _order_by_use(
    arrays: dict[str, mx.array], facts: PredictorFacts, inputs: np.ndarray
) -> np.ndarray:
    """Neurons in an order in which those lie together that are predicted together."""
    units, dims = len(arrays["bias"]), inputs.shape[1]
    predictor = Predictor(dims, units, facts.rank, facts.bits)
    predictor.load_weights(list(arrays.items()))
    step = max(len(inputs) // ORDER_TOKENS, 1)
    bits = [
        np.packbits(np.array(predictor(mx.array(x))), axis=1)
        for x in np.array_split(inputs[::step], max(ORDER_TOKENS // 256, 1))
        if len(x)
    ]
    return order_by_coactivation(np.concatenate(bits), units)
