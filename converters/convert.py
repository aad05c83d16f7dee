"""Write a flash folder from a checkpoint, one layer at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from .. import format
from ..errors import FlashError
from ..layers import ACTIVATIONS
from ..safetensors_io import DTYPES, write_error
from ..stock import Stock, load_stock
from . import calibrate, neurons, resident
from .blocks import BlockConversion
from .experts import ExpertConversion
from .fit import FitOptions, default_rank, fit_predictor, split
from .layerwise import LayerwiseModel
from .source import Source
from .workfolder import WorkFolder

CALIBRATION_TOKENS = 16384
# Mode → the one group size and the one number of bits that it allows, if it does so
PACKINGS = {
    "affine": (None, None),
    "mxfp4": (32, 4),
    "mxfp8": (32, 8),
    "nvfp4": (16, 4),
}
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
WEIGHT_DTYPES = ("float16", "bfloat16", "float32")


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    rank: int | None = None,
    threshold: float | None = None,
    recall: float = 0.95,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Convert a checkpoint to a flash folder.

    One layer is in memory at a time, besides the hidden states of the calibration text.
    An interrupted conversion goes on with the first layer that was not finished when
    the same call is made again.

    Args:
        src: A local folder, or a hub name such as "facebook/opt-6.7b".
        dst: The folder to write.
        revision: Branch, tag or commit of a hub repository.
        dtype: "float16", "bfloat16" or "float32"; by default the checkpoint's own.
        calibration: A text file on which predictors are trained and measured; without
            one, text is sampled from the model itself.
        calibration_tokens: How much of it.
        rank: Of all predictors; 0 for none. By default the paper's pattern.
        threshold: Probability from which a neuron is predicted; by default each layer's
            is chosen so that `recall` of its active neurons are found.
        recall: See `threshold`.
        bits: Quantise experts to so many bits; by default they stay as they are.
        group_size: Weights that share a scale (64, or what `mode` prescribes).
        mode: MLX's quantisation: "affine", "mxfp4", "mxfp8" or "nvfp4".
        overwrite: Replace `dst` if it is a flash folder.
        progress: Show progress bars on stderr.

    Returns:
        `dst` as a path.

    Raises:
        FlashError: If the source is missing, damaged or not supported, changed since an
            interrupted conversion began, or the disk is full. `dst` is then untouched.
    """
    work = WorkFolder(Path(dst).expanduser())
    work.check_destination(overwrite)
    source = Source(src, revision)
    work.check_source(source.folder)
    is_neurons = source.config["model_type"] in neurons.FFN_PATHS
    if is_neurons:
        dtype = dtype or source.dtype()
        _check_request(source, dtype, rank, threshold, recall, calibration_tokens)
    quantize = _packing(bits, group_size, mode, is_neurons)
    options = {
        "dtype": dtype,
        "calibration": str(calibration) if calibration else None,
        "calibration_tokens": calibration_tokens,
        "rank": rank,
        "threshold": threshold,
        "recall": recall,
        "quantize": quantize,
    }
    bars = functools.partial(tqdm, disable=not progress)
    try:
        work.begin({"source": source.fingerprint(), "options": options})
        try:
            with _no_mlx_cache():
                if is_neurons:
                    fit = FitOptions(rank, threshold, recall)
                    _Conversion(source, work, options, fit, bars).run()
                else:
                    cast = getattr(mx, dtype) if dtype else None
                    kind, stock = _stock_kind(source)
                    kind(source, stock, work, cast, quantize, bars).run()
        except BaseException:
            work.drop_if_empty()
            raise
        work.publish()
    except OSError as error:
        raise write_error(Path(error.filename or work.folder), error) from error
    return work.dst


class _Conversion:
    def __init__(self, source: Source, work: WorkFolder, options, fit, bars):
        self.source, self.work, self.options = source, work, options
        self.fit, self.bars = fit, bars
        self.dtype = getattr(mx, options["dtype"])
        self.model_type = source.config["model_type"]
        self.activation = _activation(source.config)
        # float16 is emulated on MLX's CPU backend, many times slower than float32.
        on_cpu = mx.default_device() == mx.cpu
        self.model = LayerwiseModel(source, mx.float32 if on_cpu else self.dtype)
        self.modules = neurons.ffn_modules(self.model.model, self.model_type)
        self._check_disk()
        source.prepare(work.path(""))
        resident.check_names(source, self.model.model)

    def run(self) -> None:
        done, total = len(self.work.layers), len(self.modules)
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
        before = self.work.facts["source"]
        if self.source.fingerprint() != before:
            raise self.work.source_changed()
        self._finish(tokens)

    def _convert_layer(self, index: int, tokens, hidden) -> dict:
        """Measure, fit and write one layer; returns its entry in the manifest."""
        inputs = facts = None
        if hidden is not None:
            inner = neurons.FFN_PATHS[self.model_type][0]
            inputs = calibrate.run_layer(self.model, index, inner, hidden, tokens)
        layer = neurons.neuron_layer(
            self.source.weights(), self.modules[index], self.model_type, self.dtype
        )
        if hidden is not None:
            dims = layer.up.shape[1]
            rank = self.fit.rank or default_rank(index, len(self.modules), dims)
            arrays, facts = fit_predictor(
                inputs, layer, self.activation, rank, self.fit, tokens.shape[1], index
            )
            named = {f"{layer.module}.predictor.{k}": w for k, w in arrays.items()}
            resident.write_weights(self._predictor_path(index), named)
            self.work.save_array(_hidden_name(index + 1), hidden)
        path = self.work.folder / f"ffn/layer_{index:02d}.safetensors"
        entry = neurons.write_bundles(path, layer)
        return dataclasses.asdict(dataclasses.replace(entry, predictor=facts))

    def _finish(self, tokens) -> None:
        """Write what belongs to no layer, and the manifest last."""
        weights = self.source.weights()
        names = neurons.resident_names(weights, self.modules, self.model_type)
        kept = {new: weights[old].astype(self.dtype) for old, new in names.items()}
        del weights
        folder = self.work.folder
        held = resident.write_weights(folder / format.RESIDENT, kept)
        predictors = None
        if self.fit.rank != 0:
            arrays: dict[str, mx.array] = {}
            for index in range(len(self.modules)):
                arrays |= mx.load(str(self._predictor_path(index)))
            path = folder / format.PREDICTORS
            predictors = resident.write_weights(path, arrays)
        resident.copy_config(self.source, folder, {"dtype": self.options["dtype"]})
        resident.write_manifest(
            self.work,
            self.source,
            unit="neuron",
            activation=self.activation,
            dtype=self.options["dtype"],
            resident=held,
            predictors=predictors,
            calibration=self._calibration_facts(tokens),
        )

    def _tokens(self) -> np.ndarray:
        """The calibration text; kept on disk, so that a resumed run reads the same."""
        name = "tokens.npy"
        if not self.work.path(name).exists():
            count, text = (
                self.options["calibration_tokens"],
                self.options["calibration"],
            )
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

    def _check_disk(self) -> None:
        values = sum(w.size for _, w in tree_flatten(self.model.model.parameters()))
        # A tenth for predictors and the states of the calibration text.
        need = 1.1 * values * DTYPES[self.options["dtype"]][1]
        need *= 1 - len(self.work.layers) / len(self.modules)
        if not self.work.layers:
            need += self.source.copied_bytes()
        free = shutil.disk_usage(self.work.folder).free
        if free < need:
            raise FlashError(
                f"The conversion needs about {need / 1e9:.2f} GB, "
                f"{self.work.dst.parent} has {free / 1e9:.2f} GB free. Free some space "
                "or choose another folder."
            )


def _hidden_name(index: int) -> str:
    return f"hidden_{index:02d}.npy"


def _activation(config: dict) -> str:
    """The FFN's non-linearity, under whichever name a model type gives it."""
    for key in ("activation_function", "activation", "hidden_act"):
        if isinstance(config.get(key), str):
            return config[key]
    return {"opt": "relu", "falcon": "gelu"}.get(config["model_type"], "relu2")


def _check_request(source: Source, dtype, rank, threshold, recall, count) -> None:
    if dtype not in WEIGHT_DTYPES:
        raise FlashError(f"No dtype {dtype!r}. Choose {', '.join(WEIGHT_DTYPES)}.")
    if rank is not None and rank < 0:
        raise FlashError(f"A predictor cannot have rank {rank}. Give 0 for none.")
    if threshold is not None and not 0 < threshold < 1:
        raise FlashError(f"A threshold of {threshold} is no probability. Try 0.5.")
    if not 0 < recall <= 1:
        raise FlashError(f"A recall of {recall} is not possible. Try 0.95.")
    if count < 1:
        raise FlashError(f"{count} calibration tokens are too few. Try 16384.")
    if "quantization" in source.config or "quantization_config" in source.config:
        raise FlashError(
            f"{source.name} is quantised already. Neuron bundles are made from float "
            "weights: convert the original checkpoint."
        )
    if _activation(source.config) not in ACTIVATIONS:
        raise FlashError(
            f"{source.name} has the activation {_activation(source.config)!r}, which "
            f"never gives exact zeros. Supported: {', '.join(ACTIVATIONS)}."
        )


def _stock_kind(source: Source) -> tuple[type[ExpertConversion], Stock]:
    """What becomes of a checkpoint that mlx-lm loads: experts, or blocks."""
    if source.copied_bytes():
        raise FlashError(
            f"{source.name} has .bin files, which mlx-lm does not read. Convert them "
            "to safetensors first."
        )
    stock = load_stock(source.folder)
    for kind in (ExpertConversion, BlockConversion):
        if kind.find(stock.model):
            return kind, stock
    raise FlashError(
        f"{source.name}: a model of type {source.config['model_type']!r} has no FFN "
        "that can be brought from flash: neither ReLU neurons, nor mixture-of-experts "
        "layers (SwitchGLU or SwitchMLP of mlx-lm), nor dense FFNs of two or three "
        "projections."
    )


def _packing(bits, group_size, mode: str, is_neurons: bool) -> dict | None:
    """What `mx.quantize` takes, or None for weights as they are."""
    if mode not in PACKINGS:
        raise FlashError(
            f"No quantisation mode {mode!r}. Choose {', '.join(PACKINGS)}."
        )
    if bits is None and mode == "affine":
        return None
    if is_neurons:
        raise FlashError("Neuron bundles cannot be quantised yet: leave out --bits.")
    only_size, only_bits = PACKINGS[mode]
    packing = {"group_size": group_size or only_size or 64, "bits": bits or only_bits}
    sound = only_size in (None, packing["group_size"]) and (
        packing["bits"] == only_bits if only_bits else packing["bits"] in AFFINE_BITS
    )
    if not sound or packing["group_size"] not in (16, 32, 64, 128):
        raise FlashError(
            f"MLX has no {mode} quantisation of {packing['bits']} bits in groups of "
            f"{packing['group_size']}. Try --bits 4 --group-size 64."
        )
    return packing | {"mode": mode}


@contextlib.contextmanager
def _no_mlx_cache() -> Iterator[None]:
    """MLX keeps freed memory for reuse; a conversion would rather not hold it."""
    before = mx.set_cache_limit(0)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
