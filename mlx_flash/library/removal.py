"""Delete what we converted, and nothing else."""

import shutil
from pathlib import Path

from ..checkpoints.shelf import Shelved, shelf, shelved
from ..converters.lock import Lock
from ..errors import FlashError
from ..storage.in_use import is_held
from ..storage.manifest import MANIFEST
from ..storage.safetensors import write_error


def to_remove(name: str | Path) -> Shelved:
    """The place on the shelf of what somebody wants to be rid of.

    Raises:
        FlashError: If nothing of that name is there, or a process uses it.
    """
    place = shelved(name)
    if not place.is_ours:
        raise FlashError(
            f"{name} is not among the models in {shelf()}: see mlx-flash list. Other "
            "folders are yours to delete; downloads go with hf cache rm."
        )
    _check_use(place)
    return place


def remove(place: Shelved) -> None:
    """Delete a conversion, finished or not.

    Raises:
        FlashError: If a process uses it or makes it, or the system refuses.
    """
    _check_use(place)
    with Lock(place.folder):  # refuses while it is being converted
        # What is left after a kill must not look like a model.
        paths = [place.folder / MANIFEST, *place.paths()]
        for path in paths:
            try:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                raise write_error(path, error) from error


def _check_use(place: Shelved) -> None:
    if is_held(place.folder):
        raise FlashError(
            f"{place.name} is in use by a process that loaded it. End that one first."
        )
