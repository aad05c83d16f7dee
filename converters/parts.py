"""Copy the parts of a flash folder that several machines keep, layer by layer.

Every file of the source is held against its digest before anything is copied from it.
Several folders are filled at a time, so that each layer is judged once.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.digests import compare, manifest_digests, side_digests, side_files
from ..errors import FlashError
from ..progress import Bar
from ..storage.digests import file_sha256
from ..storage.manifest import (
    MANIFEST,
    Layer,
    Manifest,
    StoredShare,
    Weights,
    version_of,
)
from ..storage.manifest_reading import check_manifest, parse_manifest
from ..storage.safetensors import write_error
from .bundles import StoredBundles, write_bundles
from .portion import Portion
from .workfolder import WorkFolder


@dataclasses.dataclass(frozen=True)
class Part:
    """A part that is being written."""

    portion: Portion
    share: StoredShare
    work: WorkFolder

    def is_made(self, overwrite: bool) -> bool:
        """Whether an earlier run came as far as its final name.

        Args:
            overwrite: Count only what was interrupted while it cleaned up after that.
        """
        work = self.work
        if overwrite and (work.folder.exists() or not work.partial.exists()):
            return False
        try:
            return parse_manifest(work.dst).share == self.share
        except FlashError:
            return False


def write_parts(
    folder: Path,
    manifest: Manifest,
    parts: Sequence[Part],
    overwrite: bool,
    progress: bool,
) -> None:
    """Write all parts that are not there yet, each of which takes its name at the end.

    Args:
        folder, manifest: Of the whole model.
    """
    missing = [entry for entry in parts if not entry.is_made(overwrite)]
    # Where all are there already, somebody may have meant to replace them.
    done = not missing and not any(entry.work.partial.exists() for entry in parts)
    for entry in parts if done else missing:
        entry.work.check_destination(overwrite)
        entry.work.check_source(folder)
    for entry in parts:
        if entry not in missing:
            entry.work.drop_leftovers()
    if not missing:
        return
    try:
        _fill(folder, manifest, missing, progress)
        for entry in missing:
            entry.work.publish()
            entry.work.discard()
    except OSError as error:
        place = Path(error.filename or missing[0].work.folder)
        raise write_error(place, error) from error


def _fill(
    folder: Path, manifest: Manifest, parts: Sequence[Part], progress: bool
) -> None:
    """Write the parts in their work folders, all of them or what is missing."""
    begun = []
    try:
        for entry in parts:
            options = {"shares": entry.share.shares, "part": entry.share.part}
            source = file_sha256(folder / MANIFEST)
            entry.work.begin({"source": source, "options": options})
            begun.append(entry)
        nbytes = sum(_missing_bytes(manifest, entry) for entry in parts)
        _check_disk(nbytes, parts[0].work.partial)
        with Bar("splitting", nbytes, progress, unit="B", unit_scale=True) as bar:
            _write_layers(folder, manifest, parts, bar)
            _check_rest(folder, manifest)
            for entry in parts:
                _write_rest(folder, manifest, entry, bar)
    except BaseException:
        for entry in begun:
            entry.work.drop_if_empty()
        raise


def _missing_bytes(manifest: Manifest, entry: Part) -> int:
    """About what is still to be written of a part."""
    layers = manifest.layers[len(entry.work.layers) :]
    on_flash = sum(layer.nbytes for layer in layers) * entry.portion.fraction
    rest = manifest.resident.bytes + manifest.beside_bytes + manifest.predictor_bytes
    return rest + int(on_flash)


def _check_disk(nbytes: int, place: Path) -> None:
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise FlashError(
            f"The parts need about {nbytes / 1e9:.2f} GB, {place.parent} has "
            f"{free / 1e9:.2f} GB free. Free some space, choose another folder, or "
            "write one part at a time: --part 1"
        )


def _write_layers(
    folder: Path, manifest: Manifest, parts: Sequence[Part], bar: Bar
) -> None:
    """Copy every layer that a part lacks, one after the other to all parts."""
    noted = manifest_digests(folder)
    for index in range(min(len(e.work.layers) for e in parts), len(manifest.layers)):
        layer = manifest.layers[index]
        compare(folder, {layer.file: noted[layer.file]}, True)
        bundles = StoredBundles(folder / layer.file, layer)
        for entry in parts:
            work = entry.work
            if len(work.layers) > index:
                continue
            path = work.folder / f"ffn/layer_{index:02d}.safetensors"
            owned = entry.portion.owned(layer.module, bundles)
            written = write_bundles(path, layer.module, bundles, owned)
            work.layers.append(
                dataclasses.replace(
                    written,
                    order=layer.order,
                    predictor=layer.predictor,
                    thresholds=layer.thresholds,
                )
            )
            work.note()
            bar.advance(written.nbytes)


def _check_rest(folder: Path, manifest: Manifest) -> None:
    """Hold what every part has against its digests."""
    layers = {layer.file for layer in manifest.layers}
    noted = manifest_digests(folder)
    rest = {name: entry for name, entry in noted.items() if name not in layers}
    compare(folder, rest, True)


def _write_rest(folder: Path, manifest: Manifest, entry: Part, bar: Bar) -> None:
    """Copy all else to a part, and write its manifest last."""
    target = entry.work.folder
    whole: list[Weights | Layer] = [manifest.resident, *manifest.beside]
    if manifest.predictors:
        whole.append(manifest.predictors)
    for weights in whole:
        copy = target / weights.file
        shutil.copyfile(folder / weights.file, copy)
        if file_sha256(copy) != weights.sha256:
            raise FlashError(
                f"{copy} reads back differently from what was copied. The disk is "
                "failing, or something else writes there."
            )
        bar.advance(weights.nbytes if isinstance(weights, Layer) else weights.bytes)
    for name, path in side_files(folder).items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
    own = dataclasses.replace(
        manifest,
        format_version=version_of(entry.share, manifest.beside),
        layers=tuple(entry.work.layers),
        side_files=side_digests(target),
        share=entry.share,
    )
    (target / MANIFEST).write_text(own.to_json())
    check_manifest(own, target)
