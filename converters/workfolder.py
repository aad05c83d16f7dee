"""The folder a conversion works in: what is done, what must be remembered, the end.

`<destination>.partial` fills up with the files of the flash folder, and `.partial/work`
with what is needed to go on after an interruption. `progress.json` is written last and
by renaming, so a layer it counts is on disk.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import FlashError
from ..storage.manifest import MANIFEST, Layer, layer_from_json

PROGRESS = "progress.json"


class WorkFolder:
    """Where one conversion happens.

    Attributes:
        folder: Becomes the flash folder.
        layers: The manifest's entries of the layers that are done.
        facts: What `begin` was given, as the first run of this conversion was.
    """

    def __init__(self, dst: Path):
        self.dst = dst = dst.resolve()  # "." has no name, and a link is not replaced
        self.folder = dst.with_name(dst.name + ".partial")
        self.layers: list[Layer] = []
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

    def check_source(self, source: Path) -> None:
        """Refuse to replace a folder together with the checkpoint that lies in it."""
        if self.dst in source.resolve().parents:
            raise FlashError(
                f"{source} lies inside {self.dst}, which would be replaced. Choose "
                "another name."
            )

    def begin(self, facts: dict) -> None:
        """Start, or go on where an earlier run with the same `facts` stopped.

        Args:
            facts: `source` (its fingerprint) and `options`, as JSON gives them back.

        Raises:
            FlashError: If an earlier run that finished layers had another source or
                other options, or its folder's name is taken by something else.
        """
        facts = json.loads(json.dumps(facts))
        self.facts, self.layers = self._earlier()
        if self.facts == facts:
            return
        if self.layers and self.facts["source"] != facts["source"]:
            raise self.source_changed()
        if self.layers:
            raise FlashError(
                f"{self.folder} is an interrupted conversion with other options. "
                f"Repeat those, or delete it and start anew: rm -r {self.folder}"
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        self.path("").mkdir(parents=True)
        (self.folder / "ffn").mkdir()
        self.facts = facts
        self.note()

    def _earlier(self) -> tuple[dict, list[Layer]]:
        """Facts and layers of an interrupted run; empty without one."""
        if not self.folder.exists():
            return {}, []
        if not self.path("").is_dir():
            raise FlashError(
                f"{self.folder} is in the way: a conversion works in a folder of that "
                "name. Move it, or choose another name."
            )
        try:
            facts = json.loads(self.path(PROGRESS).read_text())
            layers = [layer_from_json(entry) for entry in facts.pop("layers")]
        except (FileNotFoundError, ValueError):  # the machine stopped while it began
            return {}, []
        return facts, layers

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
        layers = [dataclasses.asdict(layer) for layer in self.layers]
        text = json.dumps(self.facts | {"layers": layers})
        self._write(PROGRESS, lambda file: file.write(text.encode()))

    def save_array(self, name: str, array: np.ndarray) -> None:
        """Write an .npy file, whole or not at all."""
        header = np.lib.format.header_data_from_array_1_0(array)

        def write(file) -> None:
            np.lib.format.write_array_header_1_0(file, header)
            file.write(array.data)  # np.save would not say that the disk is full

        self._write(name, write)

    def _write(self, name: str, write: Callable) -> None:
        part = self.path(name + ".part")
        try:
            with open(part, "wb") as file:
                write(file)
            os.replace(part, self.path(name))
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def drop_if_empty(self) -> None:
        """Leave nothing behind of a run that failed before it had much to keep."""
        if not self.layers and not any(self.path("").glob("*.npy")):
            shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self) -> None:
        """Give the finished folder its name, and drop what was only for the work."""
        old = self.dst.with_name(self.dst.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.dst.exists():
            os.replace(self.dst, old)
        os.replace(self.folder, self.dst)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.dst / "work")
