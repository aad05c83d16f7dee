"""What a flash folder holds, for `info`; whether it is intact, for `verify`."""

from collections.abc import Callable
from pathlib import Path

from .checkpoints.config import read_config
from .checkpoints.hub import find_model
from .errors import FlashError, printable
from .storage.manifest import Layer, Weights, read_manifest
from .storage.safetensors import file_sha256


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


def verify(model: str | Path, passed: Callable[[str], None]) -> None:
    """Hold every weight file against its digest; `passed` is told the sound ones.

    Raises:
        FlashError: Naming all files that differ.
    """
    folder = find_model(model)
    manifest = read_manifest(folder)
    read_config(folder)  # of which no digest was noted
    files: list[Weights | Layer] = [manifest.resident, *manifest.layers]
    if manifest.predictors:
        files.insert(1, manifest.predictors)
    damaged = []
    for entry in files:
        try:
            sound = file_sha256(folder / entry.file) == entry.sha256
        except OSError as error:
            raise FlashError(
                f"{folder / entry.file} cannot be read: {error.strerror}."
            ) from error
        if sound:
            passed(printable(entry.file))
        else:
            damaged.append(entry.file)
    if damaged:
        raise FlashError(
            f"{', '.join(damaged)} in {folder} differ from what was converted. Restore "
            "them from a copy, or convert the model again with --overwrite."
        )
