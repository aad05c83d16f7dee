"""Read a flash folder's manifest, and hold it against the files that it names."""

import os
from math import prod
from pathlib import Path

from ..errors import FlashError
from .files import read_json
from .manifest import (
    BESIDE_VERSION,
    BUNDLES,
    GATED,
    MANIFEST,
    UNITS,
    Layer,
    Manifest,
    version_of,
)
from .safetensors import DTYPES, read_header
from .typed_json import from_json


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
    if version > BESIDE_VERSION:
        raise FlashError(
            f"{path} has format version {version}, this mlx-flash reads up to "
            f"{BESIDE_VERSION}. Update it: pip install -U mlx-llm-in-a-flash"
        )
    return from_json(Manifest, raw, path, "manifest")


def check_manifest(manifest: Manifest, folder: Path) -> None:
    """Hold every size, shape and offset of a manifest against the files."""
    if manifest.unit not in UNITS:
        raise FlashError(f"{folder / MANIFEST}: unknown unit kind {manifest.unit!r}.")
    if manifest.dtype not in DTYPES or "float" not in manifest.dtype:
        raise FlashError(f"{folder / MANIFEST}: unknown dtype {manifest.dtype!r}.")
    if not manifest.layers:
        raise FlashError(f"{folder / MANIFEST} names no FFN layer.")
    _check_share(manifest, folder)
    _check_skipping(manifest, folder)
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
    for layer in (*manifest.layers, *manifest.beside):
        _check_layer(layer, folder)
        if layer.predictor and layer.predictor.rank > manifest.predictor_bytes:
            raise FlashError(
                f"{folder / MANIFEST}, {layer.module}: a predictor of rank "
                f"{layer.predictor.rank:,} in {manifest.predictor_bytes:,} bytes."
            )
    entries = (*manifest.layers, *manifest.beside)
    for field in ("module", "file"):
        if len({Path(getattr(entry, field)) for entry in entries}) < len(entries):
            raise FlashError(f"{folder / MANIFEST} gives two layers the same {field}.")


def _check_share(manifest: Manifest, folder: Path) -> None:
    """Hold the share that a folder says it has against its layers."""
    share = manifest.share
    version = version_of(share, manifest.beside)
    if manifest.format_version != version:
        raise FlashError(
            f"{folder / MANIFEST}: what it describes belongs to format version "
            f"{version}, this is {manifest.format_version}."
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


def _check_skipping(manifest: Manifest, folder: Path) -> None:
    """Hold what a folder says of skipping neurons against its layers."""
    skipping, problem = manifest.skipping, None
    if skipping is not None:
        problem = skipping.problem([layer.thresholds for layer in manifest.layers])
    elif any(layer.thresholds for layer in manifest.layers):
        problem = "its layers have thresholds for no shares"
    if (skipping is not None) != (manifest.unit == GATED):
        problem = f"{manifest.unit}s {'cannot' if skipping else 'must'} be skippable"
    if problem:
        raise FlashError(
            f"{folder / MANIFEST}: {problem}. Convert the model again: "
            "mlx-flash convert --skippable --overwrite"
        )


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
