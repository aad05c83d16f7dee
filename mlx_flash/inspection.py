"""What a flash folder holds, for `info`; whether a model is intact, for `verify`."""

from collections.abc import Callable
from pathlib import Path

from .assembly import can_stream, is_checkpoint
from .checkpoints.config import read_config
from .checkpoints.digests import ACCEPT, compare, without_digest
from .checkpoints.hub import find_model
from .checkpoints.record import noted_digests, record_digests
from .errors import FlashError, printable
from .storage.manifest import MANIFEST, read_manifest


def facts(model: str | Path) -> dict:
    """The figures `info --json` prints; bytes are bytes.

    `units_per_layer` and `unit_bytes` are numbers where all layers agree, else lists.
    """
    manifest = read_manifest(find_model(model))
    layers = manifest.layers

    def common(values: list[int]) -> int | list[int]:
        return values[0] if len(set(values)) == 1 else values

    return {
        "format_version": manifest.format_version,
        "unit": manifest.unit,
        "layers": len(layers),
        "units_per_layer": common([x.units for x in layers]),
        "unit_bytes": common([x.unit_bytes for x in layers]),
        "model_bytes": manifest.model_bytes,
        "resident_bytes": manifest.resident.bytes,
        "predictor_bytes": manifest.predictor_bytes,
        "ffn_bytes": manifest.ffn_bytes,
        "source": manifest.source,
        "dtype": manifest.dtype,
    }


def table(model: str | Path) -> str:
    """The same for a person, with a line for each layer."""
    folder = find_model(model)
    manifest = read_manifest(folder)
    total = manifest.model_bytes

    def size(nbytes: int) -> str:
        return f"{nbytes / 1e6:10,.1f} MB  {nbytes / total:6.1%}"

    revision = f"@{manifest.revision}" if manifest.revision else ""
    lines = [
        printable(str(folder)),
        printable(
            f"{manifest.model_type}, {manifest.activation}, {manifest.dtype}, "
            f"from {manifest.source}{revision}"
        ),
        "",
        f"model       {size(total)}",
        f"resident    {size(manifest.resident.bytes)}",
        f"on flash    {size(manifest.ffn_bytes)}  as {manifest.unit}s",
        f"predictors  {size(manifest.predictor_bytes)}  (not part of the model)",
    ]
    if c := manifest.calibration:
        lines.append(
            f"calibrated on {c.tokens:,} tokens of {printable(c.text)}, measured on "
            f"{c.held_out_tokens:,} others"
        )
    lines += ["", "layer  units   bytes   rank  active  predicted  recall    mass"]
    for index, layer in enumerate(manifest.layers):
        line = f"{index:5}  {layer.units:5}  {layer.unit_bytes:6}"
        if p := layer.predictor:
            line += (
                f"  {p.rank:5}  {p.active_share:6.1%}  {p.predicted_share:9.1%}  "
                f"{p.recall:6.1%}  {p.mass:6.1%}"
            )
        lines.append(line)
    return "\n".join(lines)


def verify(model: str | Path, passed: Callable[[str], None]) -> list[str]:
    """Hold every file of a model against its digest; `passed` is told the sound ones.

    Returns:
        The files that have no digest to compare with.

    Raises:
        FlashError: Naming all files that differ, or if no file has a digest.
    """
    folder = _find(model)
    noted = noted_digests(folder)
    if not noted:
        raise FlashError(
            f"{folder} has no digests to compare with. Note what is there now: "
            f"{ACCEPT} {folder}"
        )
    unknown = without_digest(folder, noted)
    compare(folder, noted, True, passed)
    return unknown


def record(model: str | Path, noted: Callable[[str], None]) -> None:
    """Take a model's files for sound as they are; `noted` is told their names.

    Of a flash folder these are configuration and tokenizer, of a checkpoint that is
    read in place all files.

    Raises:
        FlashError: If the digests cannot be written, or files differ from the hub's.
    """
    record_digests(_find(model), noted)


def _find(model: str | Path) -> Path:
    """The folder of a model that can be loaded: converted, or with experts in place."""
    folder = find_model(model, checkpoint=can_stream)
    converted = (folder / MANIFEST).exists()
    if converted or not (is_checkpoint(folder) and can_stream(folder)):
        read_manifest(folder)  # which says what is wrong with it, or how to make one
    read_config(folder)
    return folder
