"""A checkpoint to convert: its files, its config, and its weights, read lazily.

Nothing is held: every call of `weights` opens the files anew, and an array occupies
memory only from its evaluation until the caller lets go of it.
"""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..checkpoints.config import make_model, read_config
from ..checkpoints.hub import find_model
from ..checkpoints.weight_format import header_tensors, main_dtype, named_dtype
from ..errors import FlashError
from ..models.registry import get_model_classes
from ..storage.manifest import MANIFEST
from ..storage.safetensors import read_header
from . import torch_bin
from .arrays import load_arrays


class Source:
    """A checkpoint, found locally or on the hub.

    Attributes:
        folder, config, files: Where it is, its config.json, its weight files.
        revision: The commit if it came from the hub.
    """

    def __init__(self, name: str | Path, revision: str | None = None):
        self.name = str(name)
        self.folder = find_model(name, revision, checkpoint=True)
        # The hub's cache names a snapshot's folder after its commit.
        in_cache = self.folder.parent.name == "snapshots"
        self.revision = self.folder.name if in_cache else revision
        self.config = read_config(self.folder)
        if (self.folder / MANIFEST).exists():
            raise FlashError(f"{name} is a flash folder already.")
        self._namer = self.make_model()  # knows the checkpoint's names for its own
        self.files = _weight_files(self.folder)
        self._safetensors = self.files

    def make_model(self) -> nn.Module:
        """The model without weights; its parameters are lazy and occupy nothing."""
        classes = get_model_classes(self.config)
        return make_model(*classes, self.config, self.folder)

    def prepare(self, work: Path) -> None:
        """Bring .bin files into `work` as safetensors; others are read as they are."""
        if self.files[0].suffix == ".bin":
            self._safetensors = [torch_bin.to_safetensors(f, work) for f in self.files]

    def copied_bytes(self) -> int:
        """How much `prepare` writes."""
        return sum(f.stat().st_size for f in self.files if f.suffix == ".bin")

    def weights(self) -> dict[str, mx.array]:
        """All weights, unevaluated, under the names the model's module tree has."""
        weights: dict[str, mx.array] = {}
        for file in self._safetensors:
            read_header(file)  # MLX itself would read past the end of a cut file
            try:
                weights |= load_arrays(file)
            except RuntimeError as error:  # a dtype that MLX does not have, say
                reason = str(error).splitlines()[0]
                raise FlashError(f"{file} cannot be read: {reason}.") from error
        if hasattr(self._namer, "sanitize"):
            weights = self._namer.sanitize(weights)
        return weights

    def dtype(self) -> str:
        """The checkpoint's own dtype: what its config says, or that of most values."""
        if named := named_dtype(self.config):
            return named
        files = [file for file in self.files if file.suffix == ".safetensors"]
        sizes = header_tensors(files).values()
        return main_dtype(sizes, self.folder / "config.json")

    def fingerprint(self) -> dict[str, list[int]]:
        """Size and time of change of every file: differs when the source changed."""
        files = [*self.files, self.folder / "config.json"]
        stats = {f.name: f.stat() for f in files}
        return {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}


def _weight_files(folder: Path) -> list[Path]:
    """The checkpoint's weight files; safetensors win over .bin."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
                files = sorted(folder / name for name in names)
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                raise FlashError(
                    f"{index} is damaged. Download the checkpoint again."
                ) from None
        else:
            files = sorted(folder.glob(f"{stem}*.{suffix}"))
        for file in files:
            if not file.is_file():
                raise FlashError(f"{file} is missing. Download the checkpoint again.")
        if files:
            return files
    raise FlashError(
        f"{folder} has no weights (model*.safetensors or pytorch_model*.bin)."
    )
