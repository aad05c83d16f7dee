"""Which digests were noted of a model's files, and whether the files have them.

A converted folder has its digests in flash.json. Those of a checkpoint that is read in
place are in a record of this user's (`record.py`). Without one, the hub's cache names
some files by their digest.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import FlashError, printable
from ..storage.digests import file_sha256, sample_sha256
from ..storage.manifest import MANIFEST, Layer, SideFile, Weights
from ..storage.manifest_reading import parse_manifest
from .config import CONFIG_FILES, TEMPLATES

CHECKS = ("none", "sample", "full")
SHARDS = "model*.safetensors"  # as mlx-lm looks for them
SHA256 = re.compile(r"[0-9a-f]{64}")
ACCEPT = "mlx-flash verify --record"


@dataclass(frozen=True)
class Noted:
    """What was noted of one file.

    Attributes:
        sha256: Of all its bytes.
        sample: Of some pieces (`sample_sha256`); empty if nobody noted it.
        is_side: Whether it belongs to configuration or tokenizer. These files are
            small, and always compared whole.
        where: The end of the sentence "… differs from".
        remedy: What to do then.
    """

    sha256: str
    sample: str
    is_side: bool
    where: str
    remedy: str

    def agrees(self, path: Path, whole: bool) -> bool:
        """Whether a file has this digest. Without `whole`, weights are sampled."""
        if whole or self.is_side:
            return file_sha256(path) == self.sha256
        return not self.sample or sample_sha256(path) == self.sample


def side_files(folder: Path) -> dict[str, Path]:
    """The files of configuration and tokenizer, by their names in the folder.

    Code that a tokenizer may bring belongs to a checkpoint. `convert` and the hub's
    downloads leave it out.
    """
    converted = (folder / MANIFEST).exists()
    patterns = CONFIG_FILES if converted else [*CONFIG_FILES, "*.py"]
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    found |= set((folder / TEMPLATES).glob("*.jinja"))
    found.discard(folder / MANIFEST)
    return _by_name(folder, found)


def model_files(folder: Path) -> dict[str, Path]:
    """All files of a checkpoint: its shards, then configuration and tokenizer."""
    return _by_name(folder, folder.glob(SHARDS)) | side_files(folder)


def side_digests(folder: Path) -> tuple[SideFile, ...]:
    """The present digests of configuration and tokenizer."""
    files = side_files(folder).items()
    return tuple(SideFile(name, digest_of(path)) for name, path in files)


def digest_of(path: Path) -> str:
    """SHA-256 of a file, or one line that says why it has none."""
    try:
        return file_sha256(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def manifest_digests(folder: Path) -> dict[str, Noted]:
    """What flash.json notes."""
    manifest = parse_manifest(folder)
    weights: list[Weights | Layer] = [manifest.resident]
    if manifest.predictors:
        weights.append(manifest.predictors)
    weights += manifest.layers + manifest.beside
    remedy = "Restore them from a copy, or convert the model again with --overwrite."
    noted = {
        entry.file: Noted(
            entry.sha256, entry.sample, False, "what was converted", remedy
        )
        for entry in weights
    }
    remedy = f"If the change is yours, accept it: {ACCEPT} {folder}"
    for entry in manifest.side_files:
        noted[entry.file] = Noted(entry.sha256, "", True, "what was noted", remedy)
    return noted


def hub_digests(folder: Path) -> dict[str, Noted]:
    """What the hub's cache says: links to its large files lead to their SHA-256.

    It names small files by another digest, which depends on the server.
    """
    remedy = "Download the model again (hf download --force-download)."
    noted = {}
    for name, path in model_files(folder).items():
        if path.is_symlink():
            blob = Path(os.readlink(path))
            if blob.parent.name == "blobs" and SHA256.fullmatch(blob.name):
                is_side = not path.match(SHARDS)
                noted[name] = Noted(blob.name, "", is_side, "the hub's file", remedy)
    return noted


def without_digest(folder: Path, noted: dict[str, Noted]) -> list[str]:
    """The files that belong to the model and have nothing to be compared with."""
    converted = (folder / MANIFEST).exists()
    files = side_files(folder) if converted else model_files(folder)
    return [name for name in files if name not in noted]


def compare(
    folder: Path,
    noted: dict[str, Noted],
    whole: bool,
    passed: Callable[[str], None] = lambda name: None,
) -> None:
    """Hold files against what was noted.

    Args:
        whole: Compare every byte, instead of samples of the weights.
        passed: Is told the names of sound files.

    Raises:
        FlashError: Naming all files that differ or are missing.
    """
    small = side_files(folder)  # no other file is opened as one, whatever is noted
    differing = []
    for name, entry in noted.items():
        path = small.get(name) if entry.is_side else folder / name
        try:
            sound = path is not None and _is_file(path) and entry.agrees(path, whole)
        except OSError as error:
            raise _unreadable(folder / name, error) from error
        if sound:
            passed(printable(name))
        else:
            differing.append(name)
    if differing:
        raise FlashError(differences(folder, noted, differing))


def differences(folder: Path, noted: dict[str, Noted], names: Iterable[str]) -> str:
    """What to say of files that are missing or not as they were noted."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        entry = noted[name]
        shown = name if _is_file(folder / name) else f"{name} (missing)"
        groups.setdefault((entry.where, entry.remedy), []).append(shown)
    return " ".join(
        f"{', '.join(group)} in {folder} {'differ' if group[1:] else 'differs'} from "
        f"{where}. {remedy}"
        for (where, remedy), group in groups.items()
    )


def _by_name(folder: Path, paths: Iterable[Path]) -> dict[str, Path]:
    files = sorted(path for path in paths if _is_file(path))
    return {path.relative_to(folder).as_posix(): path for path in files}


def _is_file(path: Path) -> bool:
    """Also of names that no file can have, for which `Path.is_file` may raise."""
    return os.path.isfile(path)


def _unreadable(path: Path, error: OSError) -> FlashError:
    return FlashError(f"{path} cannot be read: {error.strerror}.")
