"""What a model holds, for `info`: what stays in memory, and what is on flash.

Of a flash folder, of a checkpoint, and of a repository of which no weights have come.
"""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import mlx.nn as nn

from ..checkpoints.config import read_config
from ..checkpoints.hub import find_config
from ..errors import printable
from ..layers.kinds import NEURON, kind_of
from ..storage.manifest import MANIFEST, Layer, Manifest, StoredShare
from ..storage.manifest_reading import parse_manifest, read_manifest
from ..tables import Table
from .outline import Outline, outline

Packing = tuple[int, int, str]  # bits, weights that share a scale, mode
PREDICTORS = ("rank", "active", "predicted", "recall", "mass")


@dataclass(frozen=True)
class Info:
    """A model as it lies.

    Attributes:
        name: Its folder, or its name on the hub.
        state: What it is, and what has to happen before it runs.
        manifest: The flash folder's, or what `convert` would write.
        resident: How weights that stay in memory are packed.
        on_flash: The same of each layer's.
    """

    name: str
    state: str
    manifest: Manifest
    resident: tuple[Packing, ...]
    on_flash: tuple[tuple[Packing, ...], ...]

    def facts(self) -> dict:
        """The figures `info --json` prints; bytes are bytes.

        What layers have is a value where all agree, else a list.
        """
        manifest, layers = self.manifest, self.manifest.layers
        return {
            "format_version": manifest.format_version,
            "unit": manifest.unit,
            "layers": len(layers),
            "units_per_layer": _common([x.units for x in layers]),
            "unit_bytes": _common([x.unit_bytes for x in layers]),
            "share": str(manifest.share) if manifest.share else None,
            "shares": list(manifest.share.shares) if manifest.share else None,
            "whole_model_bytes": manifest.whole_model_bytes,
            "model_bytes": manifest.model_bytes,
            "resident_bytes": manifest.resident.bytes,
            "predictor_bytes": manifest.predictor_bytes,
            "ffn_bytes": manifest.ffn_bytes,
            "tables": len(manifest.tables),
            "table_bytes": manifest.table_bytes,
            "blocks": len(manifest.blocks),
            "block_bytes": manifest.beside_bytes - manifest.table_bytes,
            "source": manifest.source,
            "dtype": manifest.dtype,
            "bits": _common([_bits(found) for found in self.on_flash]),
            "resident_bits": _bits(self.resident),
            "skip_perplexity": _perplexity(manifest),
        }

    def text(self) -> str:
        """What is to say of the model as a whole."""
        manifest, total = self.manifest, self.manifest.model_bytes

        def size(nbytes: int) -> str:
            return f"{nbytes / 1e6:10,.1f} MB  {nbytes / total:6.1%}"

        revision = f"@{manifest.revision}" if manifest.revision else ""
        known = manifest.activation if kind_of(manifest) is NEURON else None
        about = ", ".join(filter(None, (manifest.model_type, known, manifest.dtype)))
        converted = not self.state or manifest.share
        origin = f", from {manifest.source}{revision}" if converted else ""
        packings = sorted({_words(found, manifest.dtype) for found in self.on_flash})
        share = [self._share_row(manifest.share)] if manifest.share else []
        lines = [
            printable(self.name + (f": {self.state}" if self.state else "")),
            printable(about + origin),
            "",
            *share,
            f"{'this part' if share else 'model':12}{size(total)}",
            f"resident    {size(manifest.resident.bytes)}  "
            f"{_words(self.resident, manifest.dtype)}",
            f"on flash    {size(manifest.ffn_bytes)}  as {manifest.unit}s, "
            f"{' and '.join(packings)}",
            f"predictors  {size(manifest.predictor_bytes)}  (not part of the model)",
        ]
        if blocks := manifest.blocks:
            nbytes = manifest.beside_bytes - manifest.table_bytes
            lines.insert(
                -1,
                f"dense       {size(nbytes)}  on flash as blocks: {len(blocks)} FFNs",
            )
        if tables := manifest.tables:
            rows = sum(table.units for table in tables)
            lines.insert(
                -1,
                f"embeddings  {size(manifest.table_bytes)}  on flash as {rows:,} rows "
                f"in tables: {len(tables)}",
            )
        if c := manifest.calibration:
            lines.append(
                f"calibrated on {c.tokens:,} tokens of {printable(c.text)}, measured "
                f"on {c.held_out_tokens:,} others"
            )
        if manifest.skipping:
            lines.append(f"--skip      {manifest.skipping.summary()}")
        return "\n".join(lines)

    def _share_row(self, share: StoredShare) -> str:
        whole, parts = self.manifest.whole_model_bytes, ":".join(map(str, share.shares))
        return f"whole model {whole / 1e6:10,.1f} MB          shared out {parts}"

    def layers(self) -> Table:
        """A row for each layer, or for a run of layers that are alike."""
        predicted = any(layer.predictor for layer in self.manifest.layers)
        rows = [
            (*self._cells(index, layer), *(_predictor(layer) if predicted else ()))
            for index, layer in enumerate(self.manifest.layers)
        ]
        headings = ["layer", "weights", "units", "bytes of one"]
        numbers = enumerate(rows)
        runs = [list(run) for _, run in groupby(numbers, key=lambda pair: pair[1])]
        named = [(_span(run[0][0], run[-1][0]), *run[0][1]) for run in runs]
        headings += PREDICTORS if predicted else ()
        return Table(headings, named, left=2)

    def _cells(self, index: int, layer: Layer) -> tuple[str, str, str]:
        words = _words(self.on_flash[index], self.manifest.dtype)
        return words, f"{layer.units:,}", f"{layer.unit_bytes:,}"


def look_at(name: str | Path) -> Info:
    """Find out what a model holds, from its configuration and manifest.

    Raises:
        FlashError: If there is no such model, or it is damaged or not supported.
    """
    folder = find_config(name)
    local = Path(name).expanduser() == folder
    if not (folder / MANIFEST).exists():
        return _of_checkpoint(outline(name), str(name))
    manifest = read_manifest(folder) if local else parse_manifest(folder)
    named = read_config(folder).get("quantization") or {}
    packings = {
        path: (found["bits"], found["group_size"], found.get("mode", "affine"))
        for path, found in named.items()
        if isinstance(found, dict) and {"bits", "group_size"} <= found.keys()
    }
    state = str(manifest.share) if manifest.share else ""
    return _info(str(folder), state, manifest, packings)


def _of_checkpoint(found: Outline, name: str) -> Info:
    state = "checkpoint, runs as it is"
    if not found.in_place:
        state = f"checkpoint, to be converted ({found.disk_bytes / 1e9:,.2f} GB)"
    if found.download_bytes:
        state += f", after a download of {found.download_bytes / 1e9:,.2f} GB"
    return _info(name, state, found.manifest, _packings(found.model))


def _info(
    name: str, state: str, manifest: Manifest, packings: dict[str, Packing]
) -> Info:
    modules = [f"{layer.module}." for layer in manifest.layers]
    beside = [f"{entry.module}." for entry in manifest.beside]

    def those(*starts: str) -> tuple[Packing, ...]:
        found = {p for path, p in packings.items() if f"{path}.".startswith(starts)}
        return tuple(sorted(found))

    rest = {
        packing
        for path, packing in packings.items()
        if not f"{path}.".startswith((*modules, *beside))
    }
    on_flash = tuple(those(module) for module in modules)
    return Info(name, state, manifest, tuple(sorted(rest)), on_flash)


def _perplexity(manifest: Manifest) -> dict[str, float] | None:
    """What was measured, by the share of neurons that was skipped."""
    if (found := manifest.skipping) is None:
        return None
    pairs = zip(found.measured, found.perplexity, strict=True)
    return {f"{share:g}": perplexity for share, perplexity in pairs}


def _packings(model: nn.Module) -> dict[str, Packing]:
    return {
        path: (module.bits, module.group_size, getattr(module, "mode", "affine"))
        for path, module in model.named_modules()
        if hasattr(module, "bits") and hasattr(module, "group_size")
    }


def _words(found: tuple[Packing, ...], dtype: str) -> str:
    """How weights are stored, such as `4 bits in groups of 64`."""
    if not found:
        return dtype
    return " or ".join(
        f"{bits} bits in groups of {group}" + (f" ({mode})" * (mode != "affine"))
        for bits, group, mode in found
    )


def _bits(found: tuple[Packing, ...]) -> object:
    return _common(sorted({bits for bits, _, _ in found})) if found else None


def _common(values: list) -> object:
    """The value where all agree, else the list."""
    return values[0] if all(value == values[0] for value in values) else values


def _span(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}–{last}"


def _predictor(layer: Layer) -> tuple[str, ...]:
    p = layer.predictor
    if p is None:
        return ("–",) * len(PREDICTORS)
    shares = (p.active_share, p.predicted_share, p.recall, p.mass)
    return (str(p.rank), *(f"{share:.1%}" for share in shares))
