"""Build a model whose FFNs are on flash, without reading any of its weights.

From a flash folder, or in place from a stock mlx-lm checkpoint whose experts can be
read from its shards as they lie there. The unit kind finds the FFN modules, and makes
those that take their places.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .arrays import parameters
from .checkpoints.config import make_model, read_config
from .checkpoints.in_place import describe_in_place
from .checkpoints.stock import load_stock
from .checkpoints.tables import tables_in_place
from .errors import FlashError, reason_of
from .layers.attention import in_pieces
from .layers.base import FlashFFN, FromFlash, Guess
from .layers.exchange import exchange, exchange_beside
from .layers.foresight import Foresight
from .layers.kinds import EXPERT, UnitKind, kind_of
from .memory.footprint import Shapes, find_shapes
from .memory.trial import Trial
from .models.registry import get_model_classes
from .storage.extents import Region, bundle_extent
from .storage.layout import dtype_name
from .storage.manifest import MANIFEST, Layer, Manifest
from .storage.manifest_reading import read_manifest


@dataclass(frozen=True)
class Assembled:
    """A model before its weights are read.

    Attributes:
        model, config: As mlx-lm has them, FFNs exchanged for `layers`.
        manifest: The flash folder's, or one made up for a stock checkpoint.
        kind: Of the units.
        layers: The FFN modules, one for each of the manifest's layers.
        extents: Where each layer's units lie.
        stored: Of each layer, the numbers that its units have there; None where they
            are the same.
        shapes: For the budget.
        beside, beside_extents: The modules of what is on flash beside these layers,
            in the manifest's order, and where their units lie.
    """

    model: nn.Module
    config: dict[str, Any]
    manifest: Manifest
    kind: UnitKind
    layers: list[FlashFFN]
    extents: list[list[Region]]
    shapes: Shapes
    stored: Sequence[np.ndarray | None] = ()
    beside: Sequence[FromFlash] = ()
    beside_extents: Sequence[list[Region]] = ()

    def look_ahead(
        self, learned: Sequence[Foresight] = (), trial: Trial | None = None
    ) -> None:
        """Have every layer guess what the next one will need, where that is known.

        Args:
            learned: What to guess by, one for each layer. Without, the next layer's
                own router or predictor guesses.
            trial: Says whether guessing pays; None guesses always.
        """
        modules = dict(self.model.named_modules())
        guess: Guess | None
        for i, entry in enumerate(self.manifest.layers[1:]):
            layer, following = self.layers[i : i + 2]
            if learned:
                guess = learned[i].next_scores
            else:
                block = modules[entry.module.rpartition(".")[0]]
                guess = self.kind.guess_of(layer, block, following)
            if guess is not None:
                layer.look_ahead(following, guess, trial, first=i == 0)


def assemble(folder: Path, predictor: bool = True) -> Assembled:
    """Assemble whatever `folder` holds.

    Args:
        predictor: Whether neurons are chosen by the predictors that the folder has.

    Raises:
        FlashError: If it is damaged, contradicts itself, or has nothing to exchange.
    """
    if (folder / MANIFEST).exists() or not is_checkpoint(folder):
        return _from_flash(folder, predictor)
    return _in_place(folder)


def can_stream(folder: Path) -> bool:
    """Whether a checkpoint with this config.json has experts to stream in place."""
    config = read_config(folder)
    model = make_model(*get_model_classes(config), config, folder)
    return bool(EXPERT.find(model))


def empty_model(manifest: Manifest, config: dict, folder: Path) -> nn.Module:
    """A flash folder's model with weights that nothing evaluates."""
    model = make_model(*get_model_classes(config), config, folder)
    _quantize(model, config.get("quantization"))
    model.set_dtype(getattr(mx, manifest.dtype))
    return model


def shapes_of(model: nn.Module, config: dict, on_flash: Collection[str]) -> Shapes:
    """What the size of a model in memory depends on; its attention goes in pieces.

    Args:
        on_flash: The paths of the FFNs that go to flash.
    """
    pieces = in_pieces(model)
    shapes = find_shapes(model, config, on_flash)
    return replace(shapes, scores_in_pieces=pieces)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the files of a checkpoint, with or without experts."""
    return (folder / "config.json").exists() and any(folder.glob("model*.safetensors"))


def _from_flash(folder: Path, predictor: bool) -> Assembled:
    manifest = read_manifest(folder)
    config = read_config(folder)
    # A model of their own: Kimi K3 keeps what it computed from weights in its first run
    model = empty_model(manifest, config, folder)
    shapes = _shapes(model, manifest, config, folder)
    model = empty_model(manifest, config, folder)
    in_pieces(model)
    layers = exchange(model, manifest, predictor, folder)
    beside = exchange_beside(model, manifest, folder)
    _load_resident(model, manifest, predictor, folder)
    extents = [_bundles(entry, folder) for entry in manifest.layers]
    places = [_bundles(entry, folder) for entry in manifest.beside]
    kind = kind_of(manifest)
    found = Assembled(model, config, manifest, kind, layers, extents, shapes)
    return replace(found, beside=beside, beside_extents=places)


def _bundles(entry: Layer, folder: Path) -> list[Region]:
    return [bundle_extent(entry, folder)]


def _in_place(folder: Path) -> Assembled:
    stock = load_stock(folder)
    model, config = stock.model, stock.config
    manifest, extents = describe_in_place(stock)
    shapes = _shapes(model, manifest, config, folder)
    manifest, places = tables_in_place(stock, manifest)
    layers = exchange(model, manifest, False, folder)
    beside = exchange_beside(model, manifest, folder)
    found = Assembled(model, config, manifest, EXPERT, layers, extents, shapes)
    return replace(found, beside=beside, beside_extents=places)


def _shapes(model: nn.Module, manifest: Manifest, config: dict, folder: Path) -> Shapes:
    try:
        return shapes_of(
            model, config, [x.module for x in (*manifest.layers, *manifest.blocks)]
        )
    except Exception as error:  # MLX's and mlx-lm's, of sizes that contradict
        raise FlashError(
            f"{folder / 'config.json'} describes a model that cannot run: "
            f"{reason_of(error)}."
        ) from error


def _quantize(model: nn.Module, quantization: dict | None) -> None:
    """Quantise what the folder names, each module as the folder says."""
    if not quantization:
        return
    named = {k: v for k, v in quantization.items() if isinstance(v, dict)}
    nn.quantize(
        model,
        class_predicate=lambda path, module: (
            named.get(path, False) if hasattr(module, "to_quantized") else False
        ),
    )


def _load_resident(
    model: nn.Module, manifest: Manifest, predictor: bool, folder: Path
) -> None:
    weights = _load_file(folder / manifest.resident.file)
    if predictor and manifest.predictors:
        weights |= _load_file(folder / manifest.predictors.file)
    _check_numbers(model, weights, folder)
    try:
        model.load_weights(list(weights.items()), strict=True)
    except ValueError as error:
        raise FlashError(
            f"{folder}: its weights do not fit its config.json "
            f"({str(error).splitlines()[0]}). Convert the model again."
        ) from error
    model.eval()


def _check_numbers(
    model: nn.Module, weights: dict[str, mx.array], folder: Path
) -> None:
    """MLX takes integers for weights as it finds them, and fails in the middle."""
    for name, array in parameters(model).items():
        found = weights.get(name, array).dtype
        if mx.issubdtype(found, mx.floating) != mx.issubdtype(array.dtype, mx.floating):
            raise FlashError(
                f"{folder}: {name} cannot be of {dtype_name(found)}. Convert the model "
                "again."
            )


def _load_file(path: Path) -> dict[str, mx.array]:
    try:
        loaded = mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FlashError(f"{path} cannot be read: {reason}.") from error
    assert isinstance(loaded, dict)  # which a safetensors file always is
    return loaded
