"""The flash folder: what `convert` writes and everything else reads.

    config.json, tokenizer files   as mlx-lm reads them
    flash.json                     the manifest, described by the classes below
    resident.safetensors           all weights that stay in memory
    predictors.safetensors         neuron kind only
    ffn/layer_NN.safetensors       one uint8 tensor `bundles` [units, unit_bytes]
    ffn/table_NN.safetensors       the same of a large table of embeddings: its rows

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .skipping import Skipping
from .typed_json import from_json

FORMAT_VERSION = 1
SHARE_VERSION = 2  # of a folder that holds a share of the units
BESIDE_VERSION = 3  # of one that has more on flash than FFNs of one unit kind
MANIFEST = "flash.json"
RESIDENT = "resident.safetensors"
PREDICTORS = "predictors.safetensors"
BUNDLES = "bundles"
UNITS = ("neuron", "gated neuron", "expert", "block")
GATED = "gated neuron"  # whose gates are resident


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
    folders that an earlier version wrote. `thresholds` are those of gated neurons.
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
    thresholds: tuple[float, ...] = ()

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
    """The text of predictors or thresholds: a file's name or `sampled`."""

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

    def __str__(self) -> str:
        return f"part {self.part + 1} of {len(self.shares)}"


@dataclass(frozen=True)
class Manifest:
    """flash.json. `activation` is the FFN's non-linearity, `dtype` of all weights.

    `side_files` is empty in folders that an earlier version wrote. `layers` describe
    what the folder holds, also where that is a share.

    `blocks` are dense FFNs of a mixture of experts, whose `layers` are the experts;
    `tables` are embeddings that are only looked up, where a unit is a row. A share has
    all of both.
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
    skipping: Skipping | None = None
    tables: tuple[Layer, ...] = ()
    blocks: tuple[Layer, ...] = ()

    @property
    def beside(self) -> tuple[Layer, ...]:
        """What is on flash beside the layers."""
        return self.blocks + self.tables

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
    def table_bytes(self) -> int:
        return sum(table.nbytes for table in self.tables)

    @property
    def beside_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.beside)

    @property
    def predictor_bytes(self) -> int:
        return self.predictors.bytes if self.predictors else 0

    @property
    def model_bytes(self) -> int:
        """The model itself: all weights, predictors not counted."""
        return self.resident.bytes + self.beside_bytes + self.ffn_bytes

    @property
    def whole_model_bytes(self) -> int:
        """The same with the units that other machines have."""
        elsewhere = sum(layer.nbytes for layer in self.whole_layers) - self.ffn_bytes
        return self.model_bytes + elsewhere

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        for name in ("share", "skipping", "tables", "blocks"):
            if not fields[name]:
                del fields[name]
        for name in ("layers", "tables", "blocks"):
            for entry in fields.get(name, ()):
                if not entry["thresholds"]:
                    del entry["thresholds"]
        return json.dumps(fields, indent=1) + "\n"


def version_of(share: StoredShare | None, beside: Sequence[Layer]) -> int:
    """The lowest format version that a folder with these can have."""
    if beside:
        return BESIDE_VERSION
    return SHARE_VERSION if share else FORMAT_VERSION


def layer_from_json(entry: dict) -> Layer:
    """A layer's entry as `dataclasses.asdict` and JSON left it."""
    return from_json(Layer, json.loads(json.dumps(entry)), Path(MANIFEST), "layer")
