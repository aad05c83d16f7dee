"""Our own folder of converted models, where a model is found by its source's name.

Beside a flash folder lies a note that says what it was made of, so that a source that
changed is noticed: `Qwen--Qwen3-0.6B` and `Qwen--Qwen3-0.6B.json`.
"""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import FlashError
from ..storage.files import cache_folder, read_json, write_whole
from ..storage.identity import identity
from ..storage.manifest import MANIFEST
from ..storage.safetensors import write_error
from ..storage.typed_json import from_json
from .config import CONFIG_FILES
from .hub import REPO_NAME, WEIGHT_FILES, file_ids

NOTE_VERSION = 1


@dataclass(frozen=True)
class Note:
    """What a folder on the shelf was made of, or is being made of.

    Attributes:
        source: A hub name, or the path of a local checkpoint.
        revision: The commit of a hub repository, else "".
        files: What each file was: its digest on the hub, or size and times.
    """

    note_version: int
    source: str
    revision: str
    files: dict  # of any JSON, compared whole


@dataclass(frozen=True)
class Shelved:
    """One model's place on the shelf, whether or not anything is there."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def is_whole(self) -> bool:
        return (self.folder / MANIFEST).is_file()

    @property
    def partial(self) -> Path:
        """Where `convert` works; it is there after an interruption."""
        return self.folder.with_name(self.name + ".partial")

    @property
    def _note_path(self) -> Path:
        return self.folder.with_name(self.name + ".json")

    def paths(self) -> list[Path]:
        """All that is there of it, the note last: it says that the rest is ours."""
        folders = (self.folder, self.partial)
        found = [path for path in folders if path.is_dir() and not path.is_symlink()]
        return found + [self._note_path] if self._note_path.is_file() else found

    @property
    def is_ours(self) -> bool:
        """Whether a conversion began there."""
        begun = self.partial.is_dir() or self._note_path.is_file()
        return self.is_whole or begun

    def note(self) -> Note | None:
        """What it was made of; None if nobody knows."""
        try:
            note = from_json(Note, read_json(self._note_path), self._note_path, "note")
        except (FileNotFoundError, FlashError):
            return None
        return note if note.note_version == NOTE_VERSION else None

    def write_note(self, note: Note) -> None:
        try:
            text = json.dumps(dataclasses.asdict(note), indent=1)
            write_whole(self._note_path, text + "\n")
        except OSError as error:
            raise write_error(self._note_path, error) from error

    def drop_note_alone(self) -> None:
        """Leave no note behind where there is nothing that it is about."""
        if self.paths() == [self._note_path]:
            self._note_path.unlink()


def shelf() -> Path:
    """The folder of all converted models, below `MLX_FLASH_HOME` if that is set."""
    home = os.environ.get("MLX_FLASH_HOME")
    return (Path(home).expanduser() if home else cache_folder()) / "models"


def shelved(name: str | Path) -> Shelved:
    """The place of a model, by a hub name, a path, or the name it has on the shelf."""
    text = str(name)
    path = Path(name).expanduser()
    if not path.exists():
        if text and "/" not in text and text not in (".", ".."):
            return Shelved(shelf() / text.removesuffix(".partial"))
        if not isinstance(name, Path) and REPO_NAME.fullmatch(text):
            return Shelved(shelf() / text.replace("/", "--"))
    real = path.resolve()
    if real.parent == shelf().resolve():
        return Shelved(real.with_name(real.name.removesuffix(".partial")))
    key = hashlib.sha256(os.fsencode(real)).hexdigest()[:8]
    return Shelved(shelf() / f"{real.name or 'model'}-{key}")


def all_shelved() -> list[Shelved]:
    """Everything on the shelf, finished or not, by name."""
    if not shelf().is_dir():
        return []
    names = {path.name.removesuffix(".partial") for path in _folders(shelf())}
    return [Shelved(shelf() / name) for name in sorted(names)]


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def note_of(name: str | Path, folder: Path) -> Note:
    """What `name`, whose configuration lies in `folder`, is made of at this time."""
    if folder.parent.name == "snapshots" and not Path(name).expanduser().is_dir():
        try:
            ids: dict = file_ids(str(name), folder.name)
        except FlashError:  # no hub: the commit alone has to do
            ids = {}
        return Note(NOTE_VERSION, str(name), folder.name, ids)
    return Note(NOTE_VERSION, str(folder.resolve()), "", _local_files(folder))


def is_unchanged(note: Note, name: str | Path, folder: Path) -> bool:
    """Whether a source still is what was noted of it.

    Of a local folder, weights that were deleted since do not count.
    """
    if note.revision:
        if note.revision == folder.name:
            return True
        # Another commit may have changed a README alone.
        return bool(note.files) and note_of(name, folder).files == note.files
    now = _local_files(folder)
    return all(note.files.get(file) == seen for file, seen in now.items())


def _local_files(folder: Path) -> dict[str, list[int]]:
    patterns = [*CONFIG_FILES, *WEIGHT_FILES]
    files = {file for pattern in patterns for file in folder.glob(pattern)}
    return {file.name: identity(file) for file in sorted(files) if file.is_file()}
