"""Find a model that can run from flash by any name, and convert it once if it must be.

A flash folder and a checkpoint with experts run as they lie. Any other checkpoint is
converted into our own folder (`checkpoints.shelf`), after somebody agreed to that, and
found there from then on. If its source changes, it is converted anew.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..assembly import can_stream
from ..checkpoints.hub import find_config, find_model, has_weights, hub_cache
from ..checkpoints.in_place import runs_in_place
from ..checkpoints.shelf import Note, Shelved, is_unchanged, note_of, shelved
from ..converters.convert import convert
from ..errors import FlashError
from ..planning.outline import outline
from ..storage.manifest import MANIFEST
from .removal import remove


@dataclass(frozen=True)
class Offer:
    """A conversion that a model needs, to be agreed to.

    Attributes:
        name: Of the checkpoint, as it was given.
        place: Where it will lie.
        disk_bytes: What is written there at most.
        download_bytes: Of weights that still have to come.
        begun: Whether an earlier run was interrupted, and is gone on with.
        changed: Whether there was a conversion, of what the source was before.
    """

    name: str
    place: Shelved
    disk_bytes: int
    download_bytes: int
    begun: bool
    changed: bool

    def __str__(self) -> str:
        """What will happen, in a line."""
        if self.changed:
            why = f"{self.name} changed since it was converted, and is converted anew"
        elif self.begun:
            why = f"The conversion of {self.name} was interrupted, and goes on"
        else:
            why = f"{self.name} runs from flash once it is converted"
        takes = f"{self.disk_bytes / 1e9:,.2f} GB of disk"
        if self.download_bytes:
            takes += f", after a download of {self.download_bytes / 1e9:,.2f} GB"
        return f"{why}: {takes}, in {self.place.folder}."


Agree = Callable[[Offer], bool]


def runnable(name: str | Path, agree: Agree, progress: bool = True) -> Path:
    """The folder of a model that can run: as it lies, or converted.

    Args:
        name: A folder, a hub name, or a name that `mlx-flash list` shows.
        agree: Is asked before anything large is downloaded or written.
        progress: Whether a conversion shows how far it is.

    Raises:
        FlashError: If there is no such model, it cannot run from flash, its conversion
            was not agreed to, or does not fit on the disk.
    """
    found = converted(name)
    if found is not None:
        return found
    folder = find_config(name)
    here = has_weights(folder)
    if not needs_conversion(folder, name):
        folder = find_model(name, checkpoint=True)
        # How it holds its experts is known now, if it had to be downloaded.
        if here or not needs_conversion(folder, name):
            return folder
    place = shelved(name)
    note = note_of(name, folder)
    changed = _is_stale(place, name, folder)
    # What has come already is looked at as it lies, also where there is no hub.
    known = outline(folder if has_weights(folder) else name, note.revision or None)
    begun = place.partial.exists() and not changed
    offer = Offer(
        str(name), place, known.disk_bytes, known.download_bytes, begun, changed
    )
    _check_disk(offer)
    if not agree(offer):
        raise FlashError(f"{name} was not converted.")
    _to_shelf(name, folder, note, progress=progress)
    return place.folder


def converted(name: str | Path) -> Path | None:
    """The conversion on the shelf of what `name` is now, if there is one.

    Where the source cannot be asked, because the hub is not there or the folder is
    gone, its conversion is taken as it is.
    """
    place = shelved(name)
    path = Path(name).expanduser()
    if not place.is_whole or path.resolve() == place.folder.resolve():
        return None
    if place.note() is None or (not path.exists() and "/" not in str(name)):
        return place.folder
    try:
        folder = find_config(name)
        stale = _is_stale(place, name, folder)
    except FlashError:
        return place.folder
    return None if stale else place.folder


def needs_conversion(folder: Path, name: str | Path) -> bool:
    """Whether a model with its configuration in `folder` cannot run as it lies.

    What is no whole checkpoint needs none: loading it says what it lacks.
    """
    if (folder / MANIFEST).exists():
        return False
    local = folder.parent.name != "snapshots" or Path(name).expanduser().is_dir()
    if local and not has_weights(folder):
        return False
    return not can_stream(folder) or (has_weights(folder) and not runs_in_place(folder))


def convert_to_shelf(
    name: str | Path, revision: str | None = None, **options: Any
) -> Path:
    """Convert a checkpoint to where its name finds it; `options` are `convert`'s."""
    folder = find_config(name, revision)
    if shelved(name).folder.resolve() == folder.resolve():
        raise FlashError(f"{name} is a flash folder already.")
    note = note_of(name, folder)
    if revision is not None and not note.revision:
        options["revision"] = revision  # of a local folder, which `convert` refuses
    return _to_shelf(name, folder, note, **options)


def _to_shelf(name: str | Path, folder: Path, note: Note, **options: Any) -> Path:
    place = shelved(name)
    if _is_stale(place, name, folder):
        remove(place)
    place.write_note(note)
    try:
        # The commit is named, so that what was noted is what is read.
        options = {"revision": note.revision or None} | options
        return convert(name, place.folder, **options)
    finally:
        place.drop_note_alone()


def _is_stale(place: Shelved, name: str | Path, folder: Path) -> bool:
    """Whether what is on the shelf was made of something else than `name` is now."""
    note = place.note()
    return note is not None and not is_unchanged(note, name, folder)


def _check_disk(offer: Offer) -> None:
    """Refuse what will not fit, before anything of it is written."""
    needs: dict[int, tuple[Path, int]] = {}
    for folder, nbytes in (
        (offer.place.folder, offer.disk_bytes),
        (hub_cache(), offer.download_bytes),
    ):
        there = next(p for p in (folder, *folder.parents) if p.exists())
        device = there.stat().st_dev
        needs[device] = (there, needs.get(device, (there, 0))[1] + nbytes)
    for folder, nbytes in needs.values():
        free = shutil.disk_usage(folder).free
        done = _size(offer.place.partial) if offer.begun else 0
        if nbytes - done > free:
            raise FlashError(
                f"Converting {offer.name} needs {nbytes / 1e9:,.2f} GB of disk, and "
                f"{folder} has {free / 1e9:,.2f} GB free. Free some, or set "
                "MLX_FLASH_HOME (and HF_HOME, for the download) to another disk."
            )


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
