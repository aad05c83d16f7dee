"""Write the parts of a flash folder that several machines keep, one folder each.

A part has the whole configuration, tokenizer, resident weights and predictors, and the
bundles of its own units, bit for bit. Layer by layer the source is held against its
digest before anything is copied from it.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ..checkpoints.digests import (
    compare,
    manifest_digests,
    side_digests,
    side_files,
)
from ..checkpoints.hub import find_model
from ..checkpoints.record import check_files
from ..checkpoints.shelf import shelf
from ..errors import FlashError, reason_of
from ..machines.paths import part_name
from ..progress import bars
from ..storage.digests import file_sha256
from ..storage.manifest import (
    MANIFEST,
    SHARE_VERSION,
    Layer,
    Manifest,
    StoredShare,
)
from ..storage.manifest_reading import check_manifest, parse_manifest, read_manifest
from ..storage.safetensors import write_error
from .bundles import Bundles, write_bundles
from .lock import Lock
from .portion import Portion, shares_of
from .workfolder import WorkFolder


class StoredBundles(Bundles):
    """Bundles as a flash folder has them.

    Args:
        path: The layer's file.
        layer: Of the manifest.
    """

    def __init__(self, path: Path, layer: Layer):
        self.units = layer.units
        self.unit_bytes = layer.unit_bytes
        self.parts = layer.parts
        self._path = path
        self._data_offset = layer.data_offset

    def rows(self, start: int, stop: int) -> np.ndarray:
        first = self._data_offset + int(start) * self.unit_bytes
        wanted = int(stop - start) * self.unit_bytes
        try:
            with open(self._path, "rb") as file:
                file.seek(first)
                found = file.read(wanted)
        except OSError as error:
            raise FlashError(
                f"{self._path} cannot be read: {reason_of(error)}."
            ) from error
        if len(found) != wanted:
            raise FlashError(f"{self._path} became shorter while it was split.")
        return np.frombuffer(found, np.uint8).reshape(-1, self.unit_bytes)


@dataclasses.dataclass(frozen=True)
class _Part:
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


def split(
    src: str | Path,
    machines: int,
    dst: str | Path | None = None,
    *,
    shares: str | None = None,
    part: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Split a flash folder into parts, each of which one machine keeps.

    An interrupted run goes on with the first layer that was not finished when the same
    call is made again. Parts that it finished are not written again.

    Args:
        src: A flash folder, or a hub name of one.
        machines: How many parts.
        dst: The folder to write the parts into; by default `<src>-split` beside it.
        shares: How units are shared out, such as "2:1"; by default all alike.
        part: The one to write, from 1 on; by default all of them.
        overwrite: Replace parts that are there.
        progress: Show a progress bar on stderr.

    Returns:
        The folders of the parts.

    Raises:
        FlashError: If the source is no whole flash folder, or damaged, the shares leave
            a machine without units of a layer, a part is there already, or the disk is
            full. No part is then half there.
    """
    if machines < 2 or (part is not None and not 1 <= part <= machines):
        raise FlashError(
            f"There is no part {part or 1} of {machines}. Give two machines or more, "
            "and one of their parts."
        )
    made_of = shares_of(machines, shares)
    folder = find_model(src)
    manifest = read_manifest(folder)
    if manifest.share is not None:
        raise FlashError(
            f"{folder} holds {manifest.share} already. Split the whole model."
        )
    check_files(folder, "sample")
    for layer in manifest.layers:
        Portion(made_of, 0).owned(layer.module, _bundles(folder, layer))
    place = Path(dst).expanduser() if dst else default_place(src, folder)
    chosen = range(machines) if part is None else [part - 1]
    parts = []
    for number in chosen:
        portion = Portion(made_of, number)
        share = portion.stored(folder, manifest.resident, manifest.layers)
        work = WorkFolder(place / part_name(number, machines))
        parts.append(_Part(portion, share, work))
    was_there = place.exists()
    try:
        with ExitStack() as locks:
            for entry in parts:
                locks.enter_context(Lock(entry.work.dst))
            _write_parts(folder, manifest, parts, overwrite, progress)
    finally:
        if not was_there and place.exists() and not any(place.iterdir()):
            place.rmdir()
    return [entry.work.dst for entry in parts]


def default_place(src: str | Path, folder: Path) -> Path:
    """Where parts go without another word: beside a folder that is the user's own."""
    if folder.parent.name == "snapshots":  # in the hub's cache
        return Path(f"{str(src).rsplit('/', 1)[-1]}-split").absolute()
    folder = folder.resolve()
    if folder.parent == shelf().resolve():
        return Path(f"{folder.name}-split").absolute()
    return folder.with_name(f"{folder.name}-split")


def _write_parts(
    folder: Path,
    manifest: Manifest,
    parts: Sequence[_Part],
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
    begun = []
    try:
        for entry in missing:
            options = {"shares": entry.share.shares, "part": entry.share.part}
            source = file_sha256(folder / MANIFEST)
            entry.work.begin({"source": source, "options": options})
            begun.append(entry)
        _check_disk(manifest, missing)
        _write_layers(folder, manifest, missing, progress)
        _check_rest(folder, manifest)
        for entry in missing:
            _write_rest(folder, manifest, entry)
        for entry in missing:
            entry.work.publish()
            entry.work.discard()
    except OSError as error:
        place = Path(error.filename or parts[0].work.folder)
        raise write_error(place, error) from error
    finally:
        for entry in begun:
            entry.work.drop_if_empty()


def _write_layers(
    folder: Path, manifest: Manifest, parts: Sequence[_Part], progress: bool
) -> None:
    """Copy every layer that a part lacks, one after the other to all parts."""
    noted = manifest_digests(folder)
    total = len(manifest.layers)
    done = min(len(entry.work.layers) for entry in parts)
    for index in bars(
        range(done, total),
        "splitting",
        progress,
        initial=done,
        total=total,
        unit="layer",
    ):
        layer = manifest.layers[index]
        compare(folder, {layer.file: noted[layer.file]}, True)
        bundles = _bundles(folder, layer)
        for entry in parts:
            work = entry.work
            if len(work.layers) > index:
                continue
            path = work.folder / f"ffn/layer_{index:02d}.safetensors"
            owned = entry.portion.owned(layer.module, bundles)
            written = write_bundles(path, layer.module, bundles, owned)
            work.layers.append(
                dataclasses.replace(
                    written, order=layer.order, predictor=layer.predictor
                )
            )
            work.note()


def _check_rest(folder: Path, manifest: Manifest) -> None:
    """Hold what every part has against its digests."""
    layers = {layer.file for layer in manifest.layers}
    noted = manifest_digests(folder)
    rest = {name: entry for name, entry in noted.items() if name not in layers}
    compare(folder, rest, True)


def _write_rest(folder: Path, manifest: Manifest, entry: _Part) -> None:
    """Copy all else to a part, and write its manifest last."""
    target = entry.work.folder
    for weights in filter(None, (manifest.resident, manifest.predictors)):
        copy = target / weights.file
        shutil.copyfile(folder / weights.file, copy)
        if file_sha256(copy) != weights.sha256:
            raise FlashError(
                f"{copy} reads back differently from what was copied. The disk is "
                "failing, or something else writes there."
            )
    for name, path in side_files(folder).items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
    own = dataclasses.replace(
        manifest,
        format_version=SHARE_VERSION,
        layers=tuple(entry.work.layers),
        side_files=side_digests(target),
        share=entry.share,
    )
    (target / MANIFEST).write_text(own.to_json())
    check_manifest(own, target)


def _check_disk(manifest: Manifest, parts: Sequence[_Part]) -> None:
    """Refuse parts that do not fit on the disk, as far as they are not there yet."""
    need = 0
    for entry in parts:
        missing = manifest.layers[len(entry.work.layers) :]
        on_flash = sum(layer.nbytes for layer in missing)
        need += manifest.resident.bytes + manifest.predictor_bytes
        need += int(on_flash * entry.portion.fraction)
    place = parts[0].work.partial
    free = shutil.disk_usage(place).free
    if free < need:
        raise FlashError(
            f"The parts need about {need / 1e9:.2f} GB, {place.parent} has "
            f"{free / 1e9:.2f} GB free. Free some space, choose another folder, or "
            "write one part at a time: --part 1"
        )


def _bundles(folder: Path, layer: Layer) -> StoredBundles:
    return StoredBundles(folder / layer.file, layer)
