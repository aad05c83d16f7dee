"""The flash folder: what `convert` writes and everything else reads.

    config.json, tokenizer files   as mlx-lm reads them
    flash.json                     the manifest, described by the classes below
    resident.safetensors           all weights that stay in memory
    predictors.safetensors         neuron kind only
    ffn/layer_NN.safetensors       one uint8 tensor `bundles` [units, unit_bytes]

A unit's bundle is its parts side by side, `parts[i].offset` bytes into the bundle,
each in row-major order and little endian. For a neuron of a plain FFN these are `up`
(its row of the up projection, d_model values) and `down` (its column of the down
projection). Unit u of a layer starts `data_offset + u * unit_bytes` bytes into its
file; `data_offset` is a multiple of 16 KiB, the page of Apple silicon, so that direct
I/O can read bundles where their size is a multiple of the block size.

The manifest is judged against the files' sizes before it is believed. Digests are
compared by `checkpoints/digests.py`.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..errors import FlashError
from .files import read_json
from .safetensors import DTYPES, read_header
from .typed_json import from_json

FORMAT_VERSION = 1
SHARE_VERSION = 2  # of a folder that holds a share of the units
MANIFEST = "flash.json"
RESIDENT = "resident.safetensors"
PREDICTORS = "predictors.safetensors"
BUNDLES = "bundles"
UNITS = ("neuron", "expert", "block")


@dataclass(frozen=True)
class Part:
    """One part of a unit: `bytes` = product of `shape` times the size of `dtype`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class PredictorFacts:
    """A layer's predictor, measured on calibration text it was not trained on.

    `recall` is the share of truly active neurons that were predicted, `mass` the same
    weighted by activation, `precision` the share of predictions that were active.
    `bits` is the width its matrices are quantised to, 0 for none.
    """

    rank: int
    bits: int
    threshold: float
    recall: float
    precision: float
    mass: float
    predicted_share: float
    active_share: float


@dataclass(frozen=True)
class Layer:
    """One FFN on flash. `module` is its path in the model's module tree.

    `sample` is of some pieces of the file (`digests.sample_sha256`). It is empty in
    folders that an earlier version wrote.
    """

    module: str
    file: str
    sha256: str
    data_offset: int
    units: int
    unit_bytes: int
    parts: tuple[Part, ...]
    order: str
    predictor: PredictorFacts | None
    sample: str = ""

    @property
    def nbytes(self) -> int:
        return self.units * self.unit_bytes


@dataclass(frozen=True)
class Weights:
    """A safetensors file that is loaded whole; `bytes` counts its tensors' data.

    `sample` is as a layer's.
    """

    file: str
    sha256: str
    bytes: int
    sample: str = ""


@dataclass(frozen=True)
class SideFile:
    """A file of the configuration or the tokenizer."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Calibration:
    """The text the predictors were trained on: a file's name or `sampled`."""

    text: str
    tokens: int
    held_out_tokens: int


@dataclass(frozen=True)
class StoredShare:
    """Which units of each layer a folder holds, for one of several machines.

    `shares` are those of all parts, and this is number `part` of them, from 0 on: which
    units that are, `machines.shares.owned` says. `units` are those of each whole layer,
    and `model` is a digest of the whole folder that was split.
    """

    shares: tuple[int, ...]
    part: int
    units: tuple[int, ...]
    model: str


@dataclass(frozen=True)
class Manifest:
    """flash.json. `activation` is the FFN's non-linearity, `dtype` of all weights.

    `side_files` is empty in folders that an earlier version wrote. `layers` describe
    what the folder holds, also where that is a share.
    """

    format_version: int
    source: str
    revision: str | None
    model_type: str
    unit: str
    activation: str
    dtype: str
    resident: Weights
    predictors: Weights | None
    calibration: Calibration | None
    layers: tuple[Layer, ...]
    side_files: tuple[SideFile, ...] = ()
    share: StoredShare | None = None

    @property
    def whole_layers(self) -> tuple[Layer, ...]:
        """The layers with all of their units, wherever these are."""
        if self.share is None:
            return self.layers
        pairs = zip(self.layers, self.share.units, strict=True)
        return tuple(dataclasses.replace(layer, units=n) for layer, n in pairs)

    @property
    def ffn_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def predictor_bytes(self) -> int:
        return self.predictors.bytes if self.predictors else 0

    @property
    def model_bytes(self) -> int:
        """The model itself: resident weights and FFNs, predictors not counted."""
        return self.resident.bytes + self.ffn_bytes

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        if self.share is None:
            del fields["share"]
        return json.dumps(fields, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read `flash.json` and hold it against the files it names.

    Raises:
        FlashError: If the folder is no flash folder, was written by a newer version,
            lacks a file, or if sizes, shapes or offsets contradict each other.
    """
    manifest = parse_manifest(folder)
    check_manifest(manifest, folder)
    return manifest


def parse_manifest(folder: Path) -> Manifest:
    """Read `flash.json` alone, whose files need not be there yet."""
    path = folder / MANIFEST
    try:
        raw = read_json(path)
    except FileNotFoundError:
        raise FlashError(
            f"{folder} is not a flash folder (no {MANIFEST}). "
            f"Make one: mlx-flash convert {folder} -o {folder.name}-flash"
        ) from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if type(version) is not int or version < 1:
        raise FlashError(f"{path} is damaged: it has no valid format_version.")
    if version > SHARE_VERSION:
        raise FlashError(
            f"{path} has format version {version}, this mlx-flash reads up to "
            f"{SHARE_VERSION}. Update it: pip install -U mlx-llm-in-a-flash"
        )
    return from_json(Manifest, raw, path, "manifest")


def layer_from_json(entry: dict) -> Layer:
    """A layer's entry as `dataclasses.asdict` and JSON left it."""
    return from_json(Layer, json.loads(json.dumps(entry)), Path(MANIFEST), "layer")


def check_manifest(manifest: Manifest, folder: Path) -> None:
    """Hold every size, shape and offset of a manifest against the files."""
    if manifest.unit not in UNITS:
        raise FlashError(f"{folder / MANIFEST}: unknown unit kind {manifest.unit!r}.")
    if manifest.dtype not in DTYPES or "float" not in manifest.dtype:
        raise FlashError(f"{folder / MANIFEST}: unknown dtype {manifest.dtype!r}.")
    if not manifest.layers:
        raise FlashError(f"{folder / MANIFEST} names no FFN layer.")
    _check_share(manifest, folder)
    for weights in filter(None, (manifest.resident, manifest.predictors)):
        path = _inside(folder, weights.file)
        header, _ = read_header(path)
        stored = sum(
            e["data_offsets"][1] - e["data_offsets"][0] for e in header.values()
        )
        if stored != weights.bytes:
            raise FlashError(
                f"{path} holds {stored:,} bytes of weights, {MANIFEST} says "
                f"{weights.bytes:,}. Check the folder: mlx-flash verify {folder}"
            )
    for layer in manifest.layers:
        _check_layer(layer, folder)
        if layer.predictor and layer.predictor.rank > manifest.predictor_bytes:
            raise FlashError(
                f"{folder / MANIFEST}, {layer.module}: a predictor of rank "
                f"{layer.predictor.rank:,} in {manifest.predictor_bytes:,} bytes."
            )
    for field in ("module", "file"):
        named = {Path(getattr(layer, field)) for layer in manifest.layers}
        if len(named) < len(manifest.layers):
            raise FlashError(f"{folder / MANIFEST} gives two layers the same {field}.")


def _check_share(manifest: Manifest, folder: Path) -> None:
    """Hold the share that a folder says it has against its layers."""
    share = manifest.share
    if (share is not None) != (manifest.format_version == SHARE_VERSION):
        raise FlashError(
            f"{folder / MANIFEST}: a share belongs to format version {SHARE_VERSION}, "
            f"this is {manifest.format_version}."
        )
    if share is None:
        return
    pairs = zip(share.units, manifest.layers, strict=False)
    if (
        not 0 <= share.part < len(share.shares)
        or any(n < 1 for n in share.shares)
        or len(share.units) != len(manifest.layers)
        or any(units < layer.units for units, layer in pairs)
    ):
        raise FlashError(f"{folder / MANIFEST}: its share contradicts its layers.")


def _check_layer(layer: Layer, folder: Path) -> None:
    where = f"{folder / MANIFEST}, {layer.module}"
    if layer.units < 1 or layer.unit_bytes < 1 or not layer.parts:
        raise FlashError(f"{where}: a layer without units, bytes or parts.")
    end = 0
    for part in layer.parts:
        if part.dtype not in DTYPES or any(n < 1 for n in part.shape):
            raise FlashError(f"{where}: part {part.name} has a wrong dtype or shape.")
        if prod(part.shape) * DTYPES[part.dtype][1] != part.bytes:
            raise FlashError(
                f"{where}: part {part.name} of shape {list(part.shape)} and "
                f"{part.dtype} cannot have {part.bytes:,} bytes."
            )
        if part.offset < end or part.offset + part.bytes > layer.unit_bytes:
            raise FlashError(f"{where}: part {part.name} lies outside its bundle.")
        end = part.offset + part.bytes
    path = _inside(folder, layer.file)
    header, data_offset = read_header(path)
    entry = header.get(BUNDLES)
    if (
        data_offset != layer.data_offset
        or entry is None
        or entry["data_offsets"] != [0, layer.nbytes]
        or entry["shape"] != [layer.units, layer.unit_bytes]
    ):
        raise FlashError(
            f"{path}: {MANIFEST} speaks of {layer.units:,} bundles of "
            f"{layer.unit_bytes:,} bytes from offset {layer.data_offset:,}, which is "
            f"not what the file holds. Check the folder: mlx-flash verify {folder}"
        )


def _inside(folder: Path, name: str) -> Path:
    """The path of a file the manifest names, refused if it leads out of the folder."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise FlashError(
            f"{folder / MANIFEST} names a file outside its folder: {name}."
        )
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise FlashError(
            f"{path} is missing. Restore it or convert the model again: "
            "mlx-flash convert --overwrite"
        )
    return path
