"""Foresight of a model, in a file: beside its weights, or in this user's cache folder.

A flash folder may bring `foresight.safetensors`. Anything that this user taught by
`mlx-flash learn` lies in the cache folder, below a digest of the model's path, because
somebody's checkpoint folder is never written to. It comes first.

    LAYER.keep.*, LAYER.ahead.*  arrays of `layers.foresight`, by the layer's module
    metadata `model`             a digest of what the model was, see `model_key`
    metadata `facts`             what was measured, JSON
"""

import hashlib
import json
import os
from pathlib import Path

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from ..arrays import parameters
from ..errors import FlashError
from ..layers.foresight import Foresight
from ..storage.files import cache_folder
from ..storage.manifest import Manifest
from ..storage.safetensors import write_error

NAME = "foresight.safetensors"


def model_key(manifest: Manifest) -> str:
    """A digest of the layers that foresight is about.

    Other weights of the same shape are not told from these: what was learned from the
    one is worth little for the other, and harms nothing but speed.
    """
    layers = [(x.module, x.units, x.unit_bytes) for x in manifest.whole_layers]
    facts = [manifest.model_type, manifest.unit, layers]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def learned_path(folder: Path) -> Path:
    """Where `mlx-flash learn` writes what it learned of the model in `folder`."""
    key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return cache_folder() / "foresight" / f"{key}.safetensors"


def find_foresight(folder: Path, manifest: Manifest) -> Path | None:
    """The file that fits this model, if there is one."""
    for path in (learned_path(folder), folder / NAME):
        if path.is_file() and _metadata(path).get("model") == model_key(manifest):
            return path
    return None


def foresight_facts(path: Path) -> dict:
    """What was measured when it was learned."""
    return json.loads(_metadata(path)["facts"])


def read_foresight(path: Path, manifest: Manifest, dims: int) -> list[Foresight]:
    """One for each layer, its arrays read.

    Args:
        dims: D of the layers.

    Raises:
        FlashError: If the file is damaged.
    """
    layers = manifest.whole_layers
    try:
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        made = []
        for i, layer in enumerate(layers):
            following = layers[i + 1].units if i + 1 < len(layers) else None
            one = Foresight(dims, layer.units, following)
            start = layer.module + "."
            mine = [
                (name.removeprefix(start), array)
                for name, array in arrays.items()
                if name.startswith(start)
            ]
            one.load_weights(mine, strict=True)
            mx.eval(one.parameters())
            made.append(one)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FlashError(
            f"{path} cannot be read ({reason}). Delete it, or learn it again: "
            "mlx-flash learn"
        ) from error
    return made


def write_foresight(
    path: Path, manifest: Manifest, learned: list[Foresight], facts: dict
) -> None:
    """Write what was learned, whole or not at all.

    Raises:
        FlashError: If it cannot be written.
    """
    arrays = {
        f"{layer.module}.{name}": array
        for layer, one in zip(manifest.whole_layers, learned, strict=True)
        for name, array in parameters(one).items()
    }
    metadata = {"model": model_key(manifest), "facts": json.dumps(facts)}
    part = path.with_name(f".{path.stem}.part.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            mx.save_safetensors(str(part), arrays, metadata)
            part.chmod(0o644)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise FlashError(f"{path} cannot be written: {error}.") from error


def _metadata(path: Path) -> dict[str, str]:
    """The file's metadata; {} of one that is damaged."""
    try:
        with safe_open(str(path), "np") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}
