"""What lies on this disk that runs from flash, with sizes."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.hub import has_weights, hub_cache
from ..checkpoints.shelf import Shelved, all_shelved
from ..errors import FlashError
from ..storage.manifest import MANIFEST
from ..storage.manifest_reading import parse_manifest
from ..tables import Table
from .opening import needs_conversion

CONVERTED, HUB = "mlx-flash", "hub cache"


@dataclass(frozen=True)
class Listed:
    """A model on the disk.

    Attributes:
        name: By which every command takes it.
        kind: Its units, and what is special about it.
        nbytes: Of all its files.
        place: Whose folder it lies in.
        folder: Where.
    """

    name: str
    kind: str
    nbytes: int
    place: str
    folder: str

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def on_disk() -> list[Listed]:
    """Our conversions, then what the hub's cache has that runs as it lies."""
    return [*map(_converted, all_shelved()), *_from_hub()]


def table(models: list[Listed]) -> Table:
    rows = [
        (model.name, model.kind, model.folder, f"{model.nbytes / 1e9:,.2f} GB")
        for model in models
    ]
    return Table(("model", "kind", "where", "size"), rows, left=3)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder, each counted once."""
    files = {file.resolve() for file in folder.rglob("*") if file.is_file()}
    return sum(file.stat().st_size for file in files)


def _converted(place: Shelved) -> Listed:
    note = place.note()
    name = place.name
    if note is not None and note.revision:
        name = note.source
    folders = [path for path in place.paths() if path.is_dir()]
    kind = "conversion interrupted"
    if place.is_whole:
        kind = _kind(place.folder)
        if note is not None and not note.revision:
            kind += f", of {note.source}"
    nbytes = sum(map(size_of, folders))
    return Listed(name, kind, nbytes, CONVERTED, str(folders[0]))


def _kind(folder: Path) -> str:
    try:
        manifest = parse_manifest(folder)
        return f"{manifest.unit}s" + (f", {manifest.share}" if manifest.share else "")
    except FlashError:
        return "damaged: see mlx-flash verify"


def _from_hub() -> Iterator[Listed]:
    """Repositories in the hub's cache whose newest commit runs as it lies."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        with warnings.catch_warnings(action="ignore"):
            found = scan_cache_dir(hub_cache())
    except (CacheNotFound, ValueError, OSError):
        return
    for repo in sorted(found.repos, key=lambda repo: repo.repo_id):
        if repo.repo_type != "model" or not repo.revisions:
            continue
        newest = max(repo.revisions, key=lambda r: ("main" in r.refs, r.last_modified))
        folder = newest.snapshot_path
        with contextlib.suppress(FlashError):
            if kind := _kind_on_hub(folder):
                nbytes = size_of(folder)
                yield Listed(repo.repo_id, kind, nbytes, HUB, str(folder))


def _kind_on_hub(folder: Path) -> str:
    """What runs there; nothing if it does not, or has not come whole."""
    if (folder / MANIFEST).exists():
        whole = (folder / parse_manifest(folder).resident.file).exists()
        return _kind(folder) if whole else ""
    if not has_weights(folder) or needs_conversion(folder, folder):
        return ""
    return "experts, read in place"
