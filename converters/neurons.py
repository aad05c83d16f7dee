"""Turn a model with exact zeros in its FFNs into one bundle per neuron.

Neuron i is row i of the projections into the FFN and column i of the one out of it,
stored as a row. Biases stay resident: an element is 1/d_model of a row, and in the
bundle it would push the rows off their alignment. Each layer is run on calibration text
with the weights of no other layer in memory, and gets a predictor fitted to it.
Shapes: D model width, N neurons.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..errors import FlashError
from ..layers.dense import dense_ffns, hidden_values
from ..layers.predictor import Predictor, default_rank
from ..layers.projections import neuron_rows, pack, projections
from ..storage import manifest as format
from ..storage.safetensors import DTYPES
from . import calibrate, resident
from .bundles import write_bundles
from .fit import FitOptions, fit_predictor, split
from .layerwise import LayerwiseModel
from .placement import order_by_coactivation
from .source import Source, finite
from .workfolder import WorkFolder

MEASURED_TOKENS = 1024
ORDER_TOKENS = 4096  # of the calibration text, to see which neurons go together


class NeuronConversion:
    """One checkpoint, layer by layer.

    Args:
        source: The checkpoint.
        work: Where to write.
        options: `dtype`, `calibration`, `calibration_tokens`, `order`, `quantize`
            and `quantize_resident` of the request.
        fit: How predictors are fitted; rank 0 for none.
        bars: Makes progress bars, as `tqdm.tqdm`.
    """

    def __init__(
        self, source: Source, work: WorkFolder, options: dict, fit: FitOptions, bars
    ):
        self.source, self.work, self.options = source, work, options
        self.fit, self.bars = fit, bars
        self.dtype = getattr(mx, options["dtype"])
        # float16 is emulated on MLX's CPU backend, many times slower than float32.
        on_cpu = mx.default_device() == mx.cpu
        self.model = LayerwiseModel(source, mx.float32 if on_cpu else self.dtype)
        self.ffns = dense_ffns(self.model.model)
        self.paths = list(self.ffns)
        self._check_packing()
        self._check_disk()
        source.prepare(work.path(""))
        resident.check_names(source, self.model.model)

    def active_share(self) -> float:
        """The share of hidden values that are not zero, on some calibration text."""
        length = self._tokens().shape[1]
        tokens = self._tokens()[: max(MEASURED_TOKENS // length, 1)]
        hidden = calibrate.embed_all(self.model, tokens)
        shares = []
        for index in self.bars(
            range(len(self.paths)), "measuring", total=len(self.paths), unit="layer"
        ):
            inputs = mx.array(self._run(index, hidden, tokens))
            ffn = self._load_ffn(index, self.model.dtype)
            h = hidden_values(ffn, inputs.astype(self.model.dtype))
            shares.append(mx.mean(h != 0).item())
            self.model.release(ffn)
        return sum(shares) / len(shares)

    def run(self, activation: str) -> None:
        """Write everything; `activation` is what the config calls the zeros' cause."""
        done, total = len(self.work.layers), len(self.paths)
        tokens = hidden = None
        if self.fit.rank != 0:
            tokens = self._tokens()
            hidden = self._hidden(done, tokens)
        for index in self.bars(
            range(done, total), "converting", initial=done, total=total, unit="layer"
        ):
            self.work.layers.append(self._convert_layer(index, tokens, hidden))
            self.work.note()
            self.work.path(_hidden_name(index)).unlink(missing_ok=True)
        if self.source.fingerprint() != self.work.facts["source"]:
            raise self.work.source_changed()
        self._finish(tokens, activation)

    def _convert_layer(self, index: int, tokens, hidden) -> dict:
        """Measure, fit and write one layer; returns its entry in the manifest."""
        facts = None
        if hidden is not None:
            facts = self._fit(index, tokens, hidden)
        path = self.work.folder / f"ffn/layer_{index:02d}.safetensors"
        ffn = self._load_ffn(index, self.dtype)
        order = self._order(index)
        entry = write_bundles(path, self.paths[index], self._parts(index, ffn, order))
        self.model.release(ffn)
        entry = dataclasses.replace(
            entry,
            predictor=facts,
            order="checkpoint" if order is None else "coactivation",
        )
        return dataclasses.asdict(entry)

    def _fit(
        self, index: int, tokens: np.ndarray, hidden: np.ndarray
    ) -> format.PredictorFacts:
        """Take `hidden` through a layer, and write the predictor of its FFN."""
        inputs = self._run(index, hidden, tokens)
        ffn = self._load_ffn(index, self.dtype)
        self._as_stored(ffn)
        rank = self.fit.rank or default_rank(index, len(self.paths), inputs.shape[1])
        arrays, facts = fit_predictor(
            inputs, ffn, self.dtype, rank, self.fit, tokens.shape[1], index
        )
        self.model.release(ffn)
        if self.options["order"] == "coactivation":
            order = _order_by_use(arrays, facts, inputs)
            self.work.save_array(_order_name(index), order)
            for name, array in arrays.items():
                if not name.startswith("reduce."):  # the others have a row a neuron
                    arrays[name] = array[mx.array(order)]
        named = {f"{self.paths[index]}.predictor.{k}": w for k, w in arrays.items()}
        resident.write_weights(self._predictor_path(index), named)
        self.work.save_array(_hidden_name(index + 1), hidden)
        return facts

    def _run(self, index: int, hidden: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        path = self.paths[index].removeprefix(self.model.layer_path(index))
        return calibrate.run_layer(self.model, index, path, hidden, tokens)

    def _load_ffn(self, index: int, dtype: mx.Dtype) -> nn.Module:
        """One FFN with its weights in `dtype`; `release` it when it was used."""
        return self.model.load_module(self.paths[index], dtype)

    def _order(self, index: int) -> np.ndarray | None:
        """Which neuron lies where in a layer's bundles; None: as in the checkpoint."""
        path = self.work.path(_order_name(index))
        return np.load(path) if path.exists() else None

    def _parts(
        self, index: int, ffn: nn.Module, order: np.ndarray | None
    ) -> dict[str, mx.array]:
        """The bundles' parts, [N, …] each."""
        rows = slice(None) if order is None else mx.array(order)
        for name, weight in tree_flatten(ffn.parameters()):
            finite(f"{self.paths[index]}.{name}", weight)
        return {
            f"{name}.{key}": array
            for name, weight in neuron_rows(ffn).items()
            for key, array in pack(weight[rows], self.options["quantize"]).items()
        }

    def _as_stored(self, ffn: nn.Module) -> None:
        """Give an FFN the values its bundles have, in float32."""
        for name, rows in neuron_rows(ffn).items():
            quantize = self.options["quantize"]
            if quantize:
                packed = pack(rows, quantize)
                rows = mx.dequantize(
                    packed["weight"],
                    packed["scales"],
                    packed.get("biases"),
                    **quantize,
                )
            if rows.shape != ffn[name].weight.shape:
                rows = rows.T
            ffn[name].weight = rows
        ffn.set_dtype(mx.float32)

    def _finish(self, tokens, activation: str) -> None:
        """Write what belongs to no layer, and the manifest last."""
        on_flash = {
            f"{path}.{name}.weight"
            for path, ffn in self.ffns.items()
            for name in neuron_rows(ffn)
        }
        kept = {
            name: weight.astype(self.dtype)
            for name, weight in self.source.weights().items()
            if name not in on_flash
        }
        for index, (path, ffn) in enumerate(self.ffns.items()):
            order = self._order(index)
            for name in projections(ffn)[0]:
                bias = f"{path}.{name}.bias"
                if order is not None and bias in kept:
                    kept[bias] = kept[bias][mx.array(order)]
        folder = self.work.folder
        packed = {}
        if self.options["quantize"]:
            names = sorted(name.removesuffix(".weight") for name in on_flash)
            packed = dict.fromkeys(names, self.options["quantize"])
        if self.options["quantize_resident"]:
            model = self.source.make_model()
            model.load_weights(list(kept.items()), strict=False)
            resident.quantize_modules(
                model, self.paths, self.options["quantize_resident"]
            )
            packed |= resident.packing_of(model)
            kept = dict(tree_flatten(model.parameters()))
            kept = {k: w for k, w in kept.items() if k not in on_flash}
            del model  # it would hold what `write_weights` lets go of
        held = resident.write_weights(folder / format.RESIDENT, kept)
        predictors = None
        if self.fit.rank != 0:
            arrays: dict[str, mx.array] = {}
            for index in range(len(self.paths)):
                arrays |= mx.load(str(self._predictor_path(index)))
            path = folder / format.PREDICTORS
            predictors = resident.write_weights(path, arrays)
        config = {"dtype": self.options["dtype"]} | resident.packing_config(packed)
        resident.copy_config(self.source, folder, config)
        resident.write_manifest(
            self.work,
            self.source,
            unit="neuron",
            activation=activation,
            dtype=self.options["dtype"],
            resident=held,
            predictors=predictors,
            calibration=self._calibration_facts(tokens),
        )

    def _tokens(self) -> np.ndarray:
        """The calibration text; kept on disk, so that a resumed run reads the same."""
        name = "tokens.npy"
        if not self.work.path(name).exists():
            count = self.options["calibration_tokens"]
            text = self.options["calibration"]
            if text:
                path = Path(text).expanduser()
                tokens = calibrate.text_tokens(self.source, path, count)
            else:
                tokens = calibrate.sample_tokens(self.model, count, self.bars)
            self.work.save_array(name, tokens)
        return np.load(self.work.path(name))

    def _hidden(self, done: int, tokens: np.ndarray) -> np.ndarray:
        """The states that layer `done` gets."""
        if done == 0:
            return calibrate.embed_all(self.model, tokens)
        return np.load(self.work.path(_hidden_name(done)))

    def _calibration_facts(self, tokens) -> format.Calibration | None:
        if tokens is None:
            return None
        held_out = split(tokens.size, tokens.shape[1])[2]
        text = self.options["calibration"]
        return format.Calibration(
            text=Path(text).name if text else "sampled",
            tokens=tokens.size,
            held_out_tokens=held_out.stop - held_out.start,
        )

    def _predictor_path(self, index: int) -> Path:
        return self.work.path(f"predictor_{index:02d}.safetensors")

    def _check_packing(self) -> None:
        quantize = self.options["quantize"]
        if not quantize:
            return
        for path, ffn in self.ffns.items():
            for name, linear in neuron_rows(ffn).items():
                for size in linear.shape:
                    if size % quantize["group_size"]:
                        raise FlashError(
                            f"{path}.{name} of {linear.shape[0]:,} neurons and width "
                            f"{linear.shape[1]:,} cannot be cut into groups of "
                            f"{quantize['group_size']}. Try --group-size 32."
                        )

    def _check_disk(self) -> None:
        values = sum(w.size for _, w in tree_flatten(self.model.model.parameters()))
        # A tenth for predictors and the states of the calibration text.
        need = 1.1 * values * DTYPES[self.options["dtype"]][1]
        need *= 1 - len(self.work.layers) / len(self.paths)
        if not self.work.layers:
            need += self.source.copied_bytes()
        free = shutil.disk_usage(self.work.folder).free
        if free < need:
            raise FlashError(
                f"The conversion needs about {need / 1e9:.2f} GB, "
                f"{self.work.dst.parent} has {free / 1e9:.2f} GB free. Free some space "
                "or choose another folder."
            )


def _order_by_use(
    arrays: dict[str, mx.array], facts: format.PredictorFacts, inputs: np.ndarray
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


def _order_name(index: int) -> str:
    return f"order_{index:02d}.npy"


def _hidden_name(index: int) -> str:
    return f"hidden_{index:02d}.npy"
