"""The folder a conversion works in: what is done, what must be remembered, the end.

`<destination>.partial` is all ours. Its `flash` fills up with the files of the flash
folder, its `work` has what is needed to go on after an interruption, and its `old` is
what the destination was before. `progress.json` is written last and by renaming, when
all that it counts is on disk; digests tell whether that is still what was written.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import FlashError
from ..storage.digests import file_sha256
from ..storage.files import make_folder, sync, to_disk
from ..storage.manifest import MANIFEST, Layer, layer_from_json

PROGRESS = "progress.json"


class WorkFolder:
    """Where one conversion happens.

    Attributes:
        partial: All that this conversion writes.
        folder: In it, what becomes the flash folder.
        layers: The manifest's entries of the layers that are done.
        whole: Where only a part of each layer is kept, the entries as they would be
            with all units.
        digests: SHA-256 of the files in `work` that a resumed run needs.
        facts: What `begin` was given, as the first run of this conversion was.
    """

    def __init__(self, dst: Path):
        try:
            self.dst = dst = dst.resolve()  # "." has no name, and no link is replaced
        except (OSError, RuntimeError):
            raise FlashError(
                f"{dst} is a link to itself. Choose another name."
            ) from None
        if dst.is_symlink() or dst.is_mount():
            raise FlashError(
                f"{dst} cannot be replaced by a flash folder: a disk is mounted there, "
                "or it is a link to itself. Choose a name below it, or another."
            )
        self.partial = dst.with_name(dst.name + ".partial")
        self.folder = self.partial / "flash"
        self.old = self.partial / "old"
        self.layers: list[Layer] = []
        self.whole: list[Layer] = []
        self.digests: dict[str, str] = {}
        self.facts: dict = {}
        self._dropped: list[str] = []

    def check_destination(self, overwrite: bool) -> None:
        """Refuse to replace what is not ours, or what nobody asked to replace."""
        if not self.dst.exists() or (self.dst.is_dir() and not any(self.dst.iterdir())):
            return
        if not (self.dst / MANIFEST).exists():
            raise FlashError(
                f"{self.dst} exists and is no flash folder. Choose another name."
            )
        if not overwrite:
            raise FlashError(f"{self.dst} exists. Add --overwrite to replace it.")

    def check_source(self, source: Path) -> None:
        """Refuse to replace a folder together with the checkpoint that lies in it."""
        source = source.resolve()
        for ours in (self.dst, self.partial):
            if ours in (source, *source.parents):
                raise FlashError(
                    f"{source} lies inside {ours}, which would be replaced. Choose "
                    "another name."
                )

    def begin(self, facts: dict) -> None:
        """Start, or go on where an earlier run with the same `facts` stopped.

        Args:
            facts: `source` (its fingerprint) and `options`, as JSON gives them back.

        Raises:
            FlashError: If an earlier run that finished layers had another source or
                other options, its files were damaged, or its folder's name is taken
                by something else.
        """
        facts = json.loads(json.dumps(facts))
        self._read_progress()
        if self.layers and self.facts["source"] != facts["source"]:
            raise self.source_changed()
        if self.layers and self.facts != facts:
            raise FlashError(
                f"{self.partial} is an interrupted conversion with other options. "
                f"Repeat those, or delete it and start anew: rm -r {self.partial}"
            )
        if self.facts == facts:
            self._check_files()
        else:
            self.discard()
            # Whatever else is there after a loss of power, progress is there too.
            make_folder(self.path(""))
            self.facts, self.digests = facts, {}
            self.record()
        make_folder(self.folder / "ffn")

    def _read_progress(self) -> None:
        """Facts, layers and digests of an interrupted run; empty without one."""
        if not self.partial.exists() and not self.partial.is_symlink():
            return
        if not self._is_ours():
            raise FlashError(
                f"{self.partial} is in the way: a conversion works in a folder of that "
                "name. Move it, or choose another name."
            )
        try:
            facts = json.loads(self.path(PROGRESS).read_text())
            if facts.pop("sha256") != _digest(facts):
                return
            self.digests = facts.pop("files")
            # An earlier version's conversion, interrupted, knows of no parts.
            self.whole = [layer_from_json(e) for e in facts.pop("whole", [])]
            self.layers = [layer_from_json(entry) for entry in facts.pop("layers")]
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            return  # the machine stopped while it began
        self.facts = facts

    def _is_ours(self) -> bool:
        """Whether the work folder is from a conversion, at whatever point it ended."""
        if self.partial.is_symlink() or not self.partial.is_dir():
            return False
        if any(p.name not in ("flash", "work", "old") for p in self.partial.iterdir()):
            return False
        # Progress is the first file that comes and the last that goes.
        if self.path(PROGRESS).exists() or self.path(PROGRESS + ".part").exists():
            return True
        return all(p.is_dir() for p in self.partial.rglob("*"))

    def _check_files(self) -> None:
        """Refuse to go on with files that are not as they were written."""
        files = {self.path(name): digest for name, digest in self.digests.items()}
        files |= {self.folder / layer.file: layer.sha256 for layer in self.layers}
        for file, digest in files.items():
            if not file.is_file() or file_sha256(file) != digest:
                raise self._damaged(file)
        for part in self.partial.rglob("*.part"):
            part.unlink()

    def _damaged(self, file: Path) -> FlashError:
        return FlashError(
            f"{file} is missing or damaged, and the conversion cannot go on without "
            f"it. Delete the work folder and start anew: rm -r {self.partial}"
        )

    def source_changed(self) -> FlashError:
        return FlashError(
            f"The checkpoint changed since its conversion to {self.dst} began. Delete "
            f"what was made from the old one and start anew: rm -r {self.partial}"
        )

    def path(self, name: str) -> Path:
        """A file that is needed until the conversion is finished."""
        return self.partial / "work" / name

    def note(self) -> None:
        """Record which layers are done, and delete what was dropped."""
        self.record()
        for name in self._dropped:
            self.path(name).unlink(missing_ok=True)
        self._dropped.clear()

    def record(self) -> None:
        """Write down what is done, once all that it counts is on disk."""
        for folder in (self.folder / "ffn", self.path("")):
            if folder.exists():
                sync(folder)  # the names of what is counted
        layers = [dataclasses.asdict(layer) for layer in self.layers]
        whole = [dataclasses.asdict(layer) for layer in self.whole]
        done = {"files": self.digests, "layers": layers, "whole": whole}
        progress = self.facts | done
        text = json.dumps(progress | {"sha256": _digest(progress)})
        self._write(PROGRESS, lambda file: file.write(text.encode()))
        sync(self.path(""))

    def save_array(self, name: str, array: np.ndarray) -> None:
        """Write an .npy file, whole or not at all; `note` counts it."""
        header = np.lib.format.header_data_from_array_1_0(array)

        def write(file) -> None:
            np.lib.format.write_array_header_1_0(file, header)
            file.write(array.data)  # np.save would not say that the disk is full

        self._write(name, write)
        self.digests[name] = file_sha256(self.path(name))

    def load_array(self, name: str) -> np.ndarray:
        """What `save_array` wrote.

        Raises:
            FlashError: If the file is no longer that.
        """
        return np.load(self.sound(name))

    def sound(self, name: str) -> Path:
        """The path of a file in `work`, which is as it was written."""
        path = self.path(name)
        if not path.is_file() or file_sha256(path) != self.digests[name]:
            raise self._damaged(path)
        return path

    def drop(self, name: str) -> None:
        """Delete a file when the next `note` no longer counts it."""
        if self.digests.pop(name, None):
            self._dropped.append(name)

    def _write(self, name: str, write: Callable) -> None:
        part = self.path(name + ".part")
        try:
            with open(part, "wb") as file:
                write(file)
                file.flush()
                to_disk(file.fileno())
            os.replace(part, self.path(name))
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def drop_leftovers(self) -> None:
        """Clean up after a run that ended when the folder had its name already."""
        if self.partial.exists() and self._is_ours():
            self.discard()

    def drop_if_empty(self) -> None:
        """Leave nothing behind of a run that failed before it had much to keep."""
        if not self.layers and not any(self.path("").glob("*.npy")):
            self.discard()

    def publish(self) -> None:
        """Give the finished folder its name; what was there is kept in `old`."""
        for path in (*self.folder.rglob("*"), self.folder):
            sync(path)
        if self.dst.exists() and any(self.dst.iterdir()):
            shutil.rmtree(self.old, ignore_errors=True)
            os.replace(self.dst, self.old)
        os.replace(self.folder, self.dst)
        sync(self.partial)
        sync(self.dst.parent)

    def discard(self) -> None:
        """Delete the work folder; what was to be replaced and was not comes back."""
        if self.old.exists() and not self.dst.exists():
            os.replace(self.old, self.dst)
        shutil.rmtree(self.old, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.path("").is_dir():
            for file in self.path("").iterdir():
                if file.name != PROGRESS:  # it says that the folder is ours
                    file.unlink()
            # It goes last, also on disk.
            sync(self.path(""))
            sync(self.partial)
        shutil.rmtree(self.partial, ignore_errors=True)


def _digest(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
