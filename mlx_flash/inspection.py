"""Whether a model's files are intact, for `verify`."""

from collections.abc import Callable
from pathlib import Path

from .assembly import is_checkpoint
from .checkpoints.config import read_config
from .checkpoints.digests import ACCEPT, compare, without_digest
from .checkpoints.hub import find_model
from .checkpoints.record import noted_digests, record_digests
from .errors import FlashError
from .storage.manifest import MANIFEST, StoredShare
from .storage.manifest_reading import read_manifest


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


def share_of(model: str | Path) -> StoredShare | None:
    """The share of a model's units that its folder holds, None if it holds all."""
    folder = _find(model)
    return read_manifest(folder).share if (folder / MANIFEST).exists() else None


def _find(model: str | Path) -> Path:
    """The folder of a flash folder or checkpoint, downloaded if it is on the hub."""
    folder = find_model(model, checkpoint=True)
    if (folder / MANIFEST).exists() or not is_checkpoint(folder):
        read_manifest(folder)  # which says what is wrong with it, or how to make one
    read_config(folder)
    return folder
