"""A checkpoint to convert: its files, its config, and its weights, read lazily.

Nothing is held: every call of `weights` opens the files anew, and an array occupies
memory only from its evaluation until the caller lets go of it.
"""

import json
import re
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..checkpoints.config import make_model, read_config
from ..checkpoints.hub import CONFIG_FILES, WEIGHT_FILES, find_model
from ..checkpoints.weight_format import (
    header_tensors,
    main_dtype,
    named_dtype,
    packing_of,
    quantize,
)
from ..errors import FlashError, reason_of
from ..layers.projections import PACKED, unpack
from ..models.registry import get_model_classes
from ..storage.identity import identity
from ..storage.manifest import MANIFEST
from ..storage.manifest_reading import parse_manifest
from ..storage.safetensors import read_header
from . import torch_bin
from .arrays import load_arrays
from .workfolder import WorkFolder


class Source:
    """A checkpoint, found locally or on the hub.

    Attributes:
        folder, config, files: Where it is, its config.json, its weight files.
        revision: The commit if it came from the hub.
        fingerprint: Of its files, taken before anything was read.
    """

    def __init__(self, name: str | Path, revision: str | None = None):
        self.name = str(name)
        self.folder = find_model(name, revision, checkpoint=True)
        # The hub's cache names a snapshot's folder after its commit.
        in_cache = self.folder.parent.name == "snapshots"
        self.revision = self.folder.name if in_cache else revision
        self.fingerprint = self.look()
        self.config = read_config(self.folder)
        if (self.folder / MANIFEST).exists():
            share = parse_manifest(self.folder).share
            what = f"{share} of a flash folder" if share else "a flash folder"
            raise FlashError(f"{name} is {what} already.")
        self._namer = self.make_model()  # knows the checkpoint's names for its own
        self.files = _weight_files(self.folder)
        self._safetensors = self.files

    def make_model(self) -> nn.Module:
        """The model without weights; its parameters are lazy and occupy nothing."""
        classes = get_model_classes(self.config)
        return make_model(*classes, self.config, self.folder)

    def prepare(self, work: WorkFolder) -> None:
        """Bring .bin files into `work` as safetensors; others are read as they are."""
        if self.files[0].suffix != ".bin":
            return
        for file in self.files:
            name = file.stem + ".safetensors"
            if name not in work.digests:
                work.digests[name] = torch_bin.to_safetensors(file, work.path(name))
                work.record()
        self._safetensors = [
            work.path(file.stem + ".safetensors") for file in self.files
        ]

    def copied_bytes(self) -> int:
        """How much `prepare` writes."""
        return sum(f.stat().st_size for f in self.files if f.suffix == ".bin")

    @cached_property
    def packing(self) -> dict[str, dict]:
        """How mlx-lm quantised each module of the checkpoint, by its path."""
        found = self.config.get("quantization")
        if not found or self.files[0].suffix == ".bin":
            return {}
        file = self.folder / "config.json"
        if not isinstance(found, dict) or not {"group_size", "bits"} <= found.keys():
            raise FlashError(
                f"{file}: quantization has no group_size or no bits. Copy the original "
                "file again."
            )
        names = set(self.stored())
        if not any(name.endswith(".scales") for name in names):
            return {}
        model = self.make_model()
        try:
            quantize(model, found, names)
        except Exception as error:  # MLX's, of sizes and modes that are none
            raise FlashError(
                f"{file}: its quantization is not possible: {reason_of(error)}. Copy "
                "the original file again."
            ) from error
        return packing_of(model)

    def weights(self) -> dict[str, mx.array]:
        """All weights, unevaluated and in floats, by the names in the module tree."""
        weights = self.stored()
        for path, how in self.packing.items():
            names = {k: f"{path}.{k}" for k in PACKED if f"{path}.{k}" in weights}
            arrays = {key: weights.pop(name) for key, name in names.items()}
            try:
                weights[f"{path}.weight"] = unpack(arrays, how)
            except (ValueError, KeyError) as error:
                raise FlashError(
                    f"{self.name}: {path} is not packed as config.json says: "
                    f"{reason_of(error)}. Download the checkpoint again."
                ) from error
        return weights

    def stored(self) -> dict[str, mx.array]:
        """The same as the checkpoint has them: those of quantised modules packed."""
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

    def look(self) -> dict[str, list[int]]:
        """The identity of every file that may be read: differs when the source changed.

        Raises:
            FlashError: If one is a link that leads out of the checkpoint.
        """
        patterns = [*CONFIG_FILES, *WEIGHT_FILES]
        files = {f for pattern in patterns for f in self.folder.glob(pattern)}
        for file in sorted(files):
            self._check_link(file)
        return {f.name: identity(f) for f in sorted(files) if f.is_file()}

    def _check_link(self, file: Path) -> None:
        folder = self.folder.resolve()
        within = [folder]
        if folder.parent.name == "snapshots":  # the hub's cache links to its blobs
            within.append(folder.parents[1] / "blobs")
        if file.is_symlink() and file.resolve().parent not in within:
            raise FlashError(
                f"{file} is a link that leads out of the checkpoint. Put the file "
                "itself there."
            )


def _weight_files(folder: Path) -> list[Path]:
    """The checkpoint's weight files; safetensors win over .bin."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                raise FlashError(
                    f"{index} is damaged. Download the checkpoint again."
                ) from None
            # They are deleted in the end if that was asked for: no other may be named.
            allowed = re.compile(rf"{stem}[^/\\\0]*\.{suffix}")
            for name in names:
                if not isinstance(name, str) or not allowed.fullmatch(name):
                    raise FlashError(
                        f"{index} names {name!r}, and weight files have names such as "
                        f"{stem}-00001-of-00002.{suffix}. Download the checkpoint "
                        "again."
                    )
            files = sorted(folder / name for name in names)
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
