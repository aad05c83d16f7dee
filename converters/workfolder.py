"""The folder a conversion works in: what is done, what must be remembered, the end.

`<destination>.partial` fills up with the files of the flash folder, and `.partial/work`
with what is needed to go on after an interruption. `progress.json` is written last and
by renaming, so a layer it counts is on disk.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np

from ..errors import FlashError
from ..format import MANIFEST

PROGRESS = "progress.json"


class WorkFolder:
    """Where one conversion happens.

    Attributes:
        folder: Becomes the flash folder.
        layers: The manifest entries (as JSON) of the layers that are done.
        facts: What `begin` was given, as the first run of this conversion was.
    """

    def __init__(self, dst: Path):
        self.dst = dst
        self.folder = dst.with_name(dst.name + ".partial")
        self.layers: list[dict] = []
        self.facts: dict = {}

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

    def begin(self, facts: dict) -> None:
        """Start, or go on where an earlier run with the same `facts` stopped.

        Args:
            facts: `source` (its fingerprint) and `options`, as JSON gives them back.

        Raises:
            FlashError: If an earlier run had another source or other options.
        """
        facts = json.loads(json.dumps(facts))
        file = self.path(PROGRESS)
        if not file.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            file.parent.mkdir(parents=True)
            (self.folder / "ffn").mkdir()
            self.facts = facts
            self.note()
            return
        state = json.loads(file.read_text())
        self.layers, self.facts = state.pop("layers"), state
        if state["source"] != facts["source"]:
            raise self.source_changed()
        if state["options"] != facts["options"]:
            raise FlashError(
                f"{self.folder} is an interrupted conversion with other options. "
                f"Repeat those, or delete it and start anew: rm -r {self.folder}"
            )

    def source_changed(self) -> FlashError:
        return FlashError(
            f"The checkpoint changed since its conversion to {self.dst} began. Delete "
            f"what was made from the old one and start anew: rm -r {self.folder}"
        )

    def path(self, name: str) -> Path:
        """A file that is needed until the conversion is finished."""
        return self.folder / "work" / name

    def note(self) -> None:
        """Record which layers are done."""
        part = self.path(PROGRESS + ".part")
        part.write_text(json.dumps(self.facts | {"layers": self.layers}))
        os.replace(part, self.path(PROGRESS))

    def save_array(self, name: str, array: np.ndarray) -> None:
        """Write an .npy file, whole or not at all."""
        part = self.path(name + ".part")
        try:
            with open(part, "wb") as file:
                np.save(file, array)
            os.replace(part, self.path(name))
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def publish(self) -> None:
        """Give the finished folder its name, and drop what was only for the work."""
        old = self.dst.with_name(self.dst.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.dst.exists():
            os.replace(self.dst, old)
        os.replace(self.folder, self.dst)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.dst / "work")
