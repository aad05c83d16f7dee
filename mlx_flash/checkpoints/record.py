"""Digests of a checkpoint that is read in place, in a file of this user's own.

Somebody's checkpoint folder is never written to. The record lies in mlx-flash's cache
folder, below a digest of the checkpoint's path.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import FlashError, printable
from ..storage.digests import sample_sha256
from ..storage.files import cache_folder, read_json, write_whole
from ..storage.manifest import MANIFEST, SideFile
from ..storage.safetensors import write_error
from ..storage.typed_json import from_json
from .digests import (
    ACCEPT,
    CHECKS,
    Noted,
    compare,
    differences,
    digest_of,
    hub_digests,
    manifest_digests,
    model_files,
    side_digests,
    side_files,
    without_digest,
)

RECORD_VERSION = 1


@dataclass(frozen=True)
class Shard:
    """A file of weights; `sample` is of some pieces of it (`sample_sha256`)."""

    file: str
    sha256: str
    sample: str


@dataclass(frozen=True)
class Record:
    """Digests of all files of the checkpoint in `folder`."""

    record_version: int
    folder: str
    shards: tuple[Shard, ...]
    side_files: tuple[SideFile, ...]


def record_path(folder: Path) -> Path:
    """Where the record of a checkpoint is, whether or not there is one."""
    key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return cache_folder() / "digests" / f"{key}.json"


def noted_digests(folder: Path) -> dict[str, Noted]:
    """All that is known of the files of a model, by their names in its folder.

    Raises:
        FlashError: If flash.json or the record is damaged.
    """
    if (folder / MANIFEST).exists():
        return manifest_digests(folder)
    return _recorded(folder) or hub_digests(folder)


def check_files(folder: Path, check: str) -> None:
    """Hold a model's files against their digests.

    Args:
        check: "none"; "sample" for configuration and tokenizer, and some pieces of each
            file of weights; "full" for every byte.

    Raises:
        FlashError: Naming all files that differ. With "full", also if a file has no
            digest.
    """
    if check not in CHECKS:
        raise FlashError(
            f"No check is called {check!r}. Try {', '.join(CHECKS[:-1])} or full."
        )
    if check == "none":
        return
    noted = noted_digests(folder)
    unknown = without_digest(folder, noted)
    if check == "full" and unknown:
        raise FlashError(
            f"{', '.join(unknown)} in {folder}: no digest to compare with. Note what "
            f"is there now: {ACCEPT} {folder}"
        )
    compare(folder, noted, check == "full")


def record_digests(folder: Path, noted: Callable[[str], None]) -> None:
    """Take files as they are now for the right ones.

    Of a converted folder only configuration and tokenizer: its weights are as they were
    converted, or damaged. Of a checkpoint that is read in place, all files.

    Args:
        noted: Is told the name of each file.

    Raises:
        FlashError: If nothing can be written, or files differ from the hub's.
    """
    if (folder / MANIFEST).exists():
        path = folder / MANIFEST
        manifest = read_json(path)
        entries = side_digests(folder)
        manifest["side_files"] = [dataclasses.asdict(entry) for entry in entries]
        _write(path, manifest)
        for entry in entries:
            noted(printable(entry.file))
        return
    side, hub = side_files(folder), hub_digests(folder)
    shards, small, wrong = [], [], []
    for name, file in model_files(folder).items():
        sha256 = digest_of(file)
        if name in hub and hub[name].sha256 != sha256:
            wrong.append(name)
        if name in side:
            small.append(SideFile(name, sha256))
        else:
            shards.append(Shard(name, sha256, sample_sha256(file)))
        noted(printable(name))
    if wrong:
        raise FlashError(differences(folder, hub, wrong))
    real = str(folder.resolve())
    record = Record(RECORD_VERSION, real, tuple(shards), tuple(small))
    _write(record_path(folder), dataclasses.asdict(record))


def _recorded(folder: Path) -> dict[str, Noted]:
    """What the record says; nothing if there is none."""
    path = record_path(folder)
    remedy = f"If the change is yours, accept it: {ACCEPT} {folder}"
    try:
        raw = read_json(path)
        version = raw.get("record_version") if isinstance(raw, dict) else None
        if version != RECORD_VERSION:
            raise FlashError(f"{path} is no record of version {RECORD_VERSION}.")
        record = from_json(Record, raw, path, "record")
    except FileNotFoundError:
        return {}
    except FlashError as error:
        raise FlashError(f"{error} Make it anew: {ACCEPT} {folder}") from error
    noted = {
        shard.file: Noted(shard.sha256, shard.sample, False, "what was noted", remedy)
        for shard in record.shards
    }
    for entry in record.side_files:
        noted[entry.file] = Noted(entry.sha256, "", True, "what was noted", remedy)
    return noted


def _write(path: Path, content: dict) -> None:
    try:
        write_whole(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise write_error(path, error) from error
