"""From a checkpoint to a flash folder: one loop for neurons, experts and blocks.

What differs between them is a `Cutter`, which gives a layer as the parts of its units,
one layer at a time, and in the end all that is in no bundle.
"""

import dataclasses
import shutil
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoints.digests import side_digests
from ..errors import FlashError
from ..layers.kinds import UnitKind
from ..progress import bars
from ..storage.manifest import (
    MANIFEST,
    PREDICTORS,
    RESIDENT,
    Calibration,
    Manifest,
    version_of,
)
from ..storage.manifest_reading import check_manifest
from ..storage.skipping import Skipping
from .bundles import CutBundles, whole_sha256, write_bundles
from .options import ConvertOptions
from .portion import Portion
from .resident import copy_config, write_weights
from .source import Source
from .tables import take_tables, write_tables
from .workfolder import WorkFolder


@dataclass(frozen=True)
class Job:
    """What is converted, where, and how."""

    source: Source
    work: WorkFolder
    options: ConvertOptions
    portion: Portion | None = None  # what is kept of it, if not all

    def bars(self, items: Iterable, text: str, **options) -> Iterable:
        """Go through `items` and show how far; `options` are those of tqdm."""
        return bars(items, text, self.options.progress, **options)

    def say(self, text: str) -> None:
        """Tell of a decision."""
        if self.options.progress:
            print(text, file=sys.stderr)

    def check_disk(self, nbytes: float, ffn_bytes: float, layers: int) -> None:
        """Refuse a flash folder if what is missing of it does not fit.

        Args:
            nbytes: Of all that would be written without a portion.
            ffn_bytes: What units take of that.
        """
        work = self.work
        if self.portion:
            nbytes -= ffn_bytes * (1 - self.portion.fraction)
        need = nbytes * (1 - len(work.layers) / layers)
        if not work.layers:
            need += self.source.copied_bytes()
        free = shutil.disk_usage(work.folder).free
        if free < need:
            raise FlashError(
                f"The conversion needs about {need / 1e9:.2f} GB, {work.dst.parent} "
                f"has {free / 1e9:.2f} GB free. Free some space or choose another "
                "folder."
            )


class Cutter:
    """Cuts one checkpoint's FFNs into units of one kind.

    Attributes:
        kind: Of the units.
        activation, dtype: What the manifest says of them.
        modules: The FFNs by path, in the order of the layers.
        blocks: The paths of those that come last and become blocks beside the others,
            whatever `kind` these have.
        calibration: The text that predictors were fitted to, if there are any.
        skipping: What it costs to skip neurons, if that is possible.
    """

    kind: UnitKind
    activation: str
    dtype: str
    modules: dict[str, nn.Module]
    blocks: Collection[str] = ()
    calibration: Calibration | None = None
    skipping: Skipping | None = None

    def resume(self, done: int) -> None:
        """Get ready for the first layer, or the next after `done` finished ones."""

    def cut(self, index: int) -> tuple[dict[str, mx.array], dict[str, Any]]:
        """One layer's parts, [units, …] each, and more for its entry: see `Layer`."""
        raise NotImplementedError

    def finish(self, index: int) -> None:
        """Let go of a layer that is on flash, and will be noted next."""

    def rest(self) -> tuple[dict[str, mx.array], dict[str, dict]]:
        """All weights that stay in memory, and how quantised modules are packed."""
        raise NotImplementedError

    def predictors(self) -> dict[str, mx.array]:
        """The arrays of all predictors."""
        return {}


def write_folder(job: Job, cutter: Cutter) -> None:
    """Write every layer that is missing, then all else, and the manifest last."""
    work = job.work
    done, total = len(work.layers), len(cutter.modules)
    if job.portion:
        _check_portion(job.portion, cutter)
    cutter.resume(done)
    for index in job.bars(
        range(done, total), "converting", initial=done, total=total, unit="layer"
    ):
        _write_layer(job, cutter, index)
        cutter.finish(index)
        work.note()
    _write_rest(job, cutter)


def _check_portion(portion: Portion, cutter: Cutter) -> None:
    """Refuse shares that leave a machine without units, before anything is written."""
    for path, module in cutter.modules.items():
        if path not in cutter.blocks:
            portion.owned(path, CutBundles(cutter.kind.split(module)))


def _write_layer(job: Job, cutter: Cutter, index: int) -> None:
    # A function of its own, so that nothing holds the parts while the next are made.
    work, module = job.work, list(cutter.modules)[index]
    path = work.folder / f"ffn/layer_{index:02d}.safetensors"
    parts, facts = cutter.cut(index)
    if job.portion is None or module in cutter.blocks:
        entry = write_bundles(path, module, parts)
    else:
        bundles = CutBundles(parts)
        entry = write_bundles(path, module, bundles, job.portion.owned(module, bundles))
        work.whole.append(
            dataclasses.replace(
                entry, units=bundles.units, sha256=whole_sha256(bundles)
            )
        )
    work.layers.append(dataclasses.replace(entry, **facts))


def _write_rest(job: Job, cutter: Cutter) -> None:
    source, folder = job.source, job.work.folder
    arrays, packed = cutter.rest()
    found = take_tables(source, arrays)
    for path in found:
        job.say(f"{path} is only looked up: its rows stay on flash.")
    tables = write_tables(folder, found)
    count = len(cutter.modules) - len(cutter.blocks)
    layers, blocks = tuple(job.work.layers[:count]), tuple(job.work.layers[count:])
    resident = write_weights(folder / RESIDENT, arrays)
    predictors = cutter.predictors()
    config: dict = {"dtype": cutter.dtype}
    if packed:
        config["quantization"] = next(iter(packed.values())) | packed
    copy_config(source, folder, config)
    local = Path(source.name)
    share = None
    if job.portion:
        beside = blocks + tables
        share = job.portion.stored(folder, resident, job.work.whole, beside)
    manifest = Manifest(
        format_version=version_of(share, blocks + tables),
        # A path would say more about this machine than about the model.
        source=local.resolve().name if local.exists() else source.name,
        revision=source.revision,
        model_type=source.config["model_type"],
        unit=cutter.kind.name,
        activation=cutter.activation,
        dtype=cutter.dtype,
        resident=resident,
        predictors=write_weights(folder / PREDICTORS, predictors)
        if predictors
        else None,
        calibration=cutter.calibration,
        layers=layers,
        side_files=side_digests(folder),
        share=share,
        tables=tables,
        blocks=blocks,
        skipping=cutter.skipping,
    )
    if source.look() != source.fingerprint:  # now that nothing more of it is read
        raise job.work.source_changed()
    (folder / MANIFEST).write_text(manifest.to_json())
    check_manifest(manifest, folder)
