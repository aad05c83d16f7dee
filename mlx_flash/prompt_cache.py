"""KV caches on disk: what a model has read once, it need not read again.

A file is mlx-lm's own (`save_prompt_cache`, safetensors), with four more entries in its
metadata: the tokens that were read, the identity of what read them, whether the cache
can be cut back to fewer tokens, and a SHA-256 of the file. The digest is of all bytes,
with zeros in the place of its own 64 digits. It is held against the file before any
array is loaded. It tells damage, not malice: who may write the file may write a digest.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.models import cache as mlx_cache

from .checkpoints.digests import digest_of, model_files, side_files
from .checkpoints.record import noted_digests
from .errors import FlashError, reason_of
from .flash import Flash
from .storage.digests import READ_BYTES, sample_sha256
from .storage.files import MAX_JSON_BYTES, written_whole
from .storage.manifest import MANIFEST
from .storage.safetensors import read_metadata, write_error

VERSION = "mlx-flash prompt cache 1"
DIGEST = "sha256"
NO_DIGEST = "0" * 64
PREFIX = "0."  # mlx-lm puts it before the names of metadata


@dataclass(frozen=True)
class SavedPrompt:
    """What the header of a saved KV cache says.

    Attributes:
        path: The file.
        identity: Of the model and its settings, as `model_identity` gives it.
        tokens: What is in the cache, 8 bytes each.
        can_trim: Whether it can be cut back to the first of them.
        sha256: Digest of the file, without these digits.
        file_bytes: Its size, which is about what the cache takes in memory.
    """

    path: Path
    identity: str
    tokens: Sequence[int]
    can_trim: bool
    sha256: str
    file_bytes: int


def model_identity(flash: Flash, **settings: Any) -> str:
    """A digest of all that decides what the KV cache of some tokens is.

    That is the model's files, its dtype, whether predictors choose its neurons, what
    share of them is skipped, and mlx-lm's version. Of a checkpoint that nobody noted
    digests of, sizes and times of its weights and samples of their bytes stand for
    them.

    Args:
        flash: `model.flash`.
        settings: What else differs between runs, such as `kv_bits`.

    Raises:
        FlashError: If a file cannot be read.
    """
    facts = {
        "version": VERSION,
        "files": _files(flash.folder),
        "dtype": flash.manifest.dtype,
        "predictors": any("predictor" in layer for layer in flash.layers),
        "mlx_lm": mlx_lm.__version__,
        "settings": settings,
    }
    if flash.adapter is not None:
        facts["adapter"] = flash.adapter
    if flash.skip:
        facts["skip"] = flash.skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def save_prompt_cache(
    path: Path, cache: Sequence[Any], tokens: Sequence[int], identity: str
) -> None:
    """Write a KV cache, whole or not at all.

    Args:
        path: Must end in ".safetensors"; a file that is there is replaced.
        cache: mlx-lm's caches, one for each layer.
        tokens: What they have read.
        identity: As `model_identity` gives it.

    Raises:
        FlashError: If the name is another, if caches of this kind cannot be saved, or
            if the system refuses.
    """
    if path.suffix != ".safetensors":  # MLX would append it
        raise FlashError(f"{path} must end in .safetensors. Choose another name.")
    facts = {
        "version": VERSION,
        "identity": identity,
        "tokens": json.dumps([int(token) for token in tokens]),
        "can_trim": str(mlx_cache.can_trim_prompt_cache(list(cache))),
        DIGEST: NO_DIGEST,
    }
    part = path.with_name(f".{path.stem}.{os.getpid()}.part.safetensors")
    try:
        with written_whole(path, part):
            # A prompt is private: nobody else may read it, from the first byte on.
            os.close(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
            mlx_cache.save_prompt_cache(str(part), list(cache), facts)
            _write_digest(part)
    except OSError as error:
        raise write_error(path, error) from error
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise FlashError(f"{path} could not be written: {reason_of(error)}.") from error


def read_saved_prompt(path: Path) -> SavedPrompt:
    """What a saved KV cache says of itself. Its arrays are not read.

    Raises:
        FlashError: If there is no such file, or if it is damaged or not ours.
    """
    facts = read_metadata(path)
    try:
        if facts[f"{PREFIX}version"] != VERSION:
            raise ValueError
        tokens = json.loads(facts[f"{PREFIX}tokens"])
        if not tokens or not all(type(t) is int and t >= 0 for t in tokens):
            raise ValueError
        return SavedPrompt(
            path,
            facts[f"{PREFIX}identity"],
            array("q", tokens),
            facts[f"{PREFIX}can_trim"] == "True",
            facts[PREFIX + DIGEST],
            path.stat().st_size,
        )
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise FlashError(
            f"{path} is no prompt cache of this version of mlx-flash. Name another "
            "file, or delete it."
        ) from error
    except OSError as error:
        raise FlashError(f"{path} cannot be read: {reason_of(error)}.") from error


def load_prompt_cache(saved: SavedPrompt, model: Any, identity: str) -> list[Any]:
    """The KV cache of a file, held against its digest first.

    All of it is in memory afterwards: `saved.file_bytes`, for which there must be room.

    Args:
        saved: From `read_saved_prompt`.
        model: Whose cache it is.
        identity: Of that model, as `model_identity` gives it.

    Raises:
        FlashError: If another model made the file, or if it is damaged.
    """
    path = saved.path
    if saved.identity != identity:
        raise FlashError(
            f"{path} was made by another model, with other settings or with another "
            "version of mlx-lm. Name another file, or delete it."
        )
    try:
        if _digest(path, saved.sha256) != saved.sha256:
            raise FlashError(
                f"{path} is damaged: it does not have its digest. Delete it."
            )
        cache, facts = mlx_cache.load_prompt_cache(str(path), return_metadata=True)
        if facts.get(DIGEST) != saved.sha256:
            raise FlashError(f"{path} changed while it was read. Try again.")
        _check_cache(cache, model, saved)
        mx.eval([entry.state for entry in cache])
    except FlashError:
        raise
    except OSError as error:
        raise FlashError(f"{path} cannot be read: {reason_of(error)}.") from error
    # What mlx-lm and MLX make of a header that is no cache's may be any error.
    except Exception as error:
        raise FlashError(
            f"{path} is damaged: {reason_of(error)}. Delete it."
        ) from error
    return cache


def common_tokens(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """With how many equal tokens both begin."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return i
    return min(len(ours), len(theirs))


def _check_cache(cache: list[Any], model: Any, saved: SavedPrompt) -> None:
    """Raise unless these are caches such as the model makes, of all the tokens."""
    fresh = mlx_cache.make_prompt_cache(model)
    if len(cache) != len(fresh):
        raise ValueError(f"{len(cache)} caches, the model has {len(fresh)}")
    for entry, expected in zip(cache, fresh, strict=True):
        if not isinstance(entry, type(expected) | mlx_cache.QuantizedKVCache):
            raise ValueError(f"a {type(entry).__name__} where the model has another")
        if getattr(entry, "offset", len(saved.tokens)) != len(saved.tokens):
            raise ValueError("it has another number of tokens than it says")


def _write_digest(path: Path) -> None:
    """Put the digest of a file into its header, over the zeros."""
    header = _header(path)
    quoted = f'"{NO_DIGEST}"'.encode()
    if header.count(quoted) != 1:
        raise ValueError("the header has no single place for a digest")
    sha256 = _digest(path, NO_DIGEST)
    with open(path, "r+b") as file:
        file.seek(header.index(quoted) + 1)
        file.write(sha256.encode())


def _digest(path: Path, written: str) -> str:
    """SHA-256 of a file, with zeros in the place of the digest `written` in it."""
    header = _header(path)
    digest = hashlib.sha256(
        header.replace(f'"{written}"'.encode(), f'"{NO_DIGEST}"'.encode())
    )
    with open(path, "rb") as file:
        file.seek(len(header))
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _header(path: Path) -> bytes:
    """The length and the header of a safetensors file, as they lie there."""
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        return start + file.read(min(length, MAX_JSON_BYTES))


def _files(folder: Path) -> dict[str, Any]:
    """What tells a model's files from others, by their names."""
    if (folder / MANIFEST).exists():
        return {MANIFEST: digest_of(folder / MANIFEST)}
    noted, side = noted_digests(folder), side_files(folder)
    found: dict[str, Any] = {}
    for name, path in model_files(folder).items():
        if name in noted:
            found[name] = noted[name].sha256
        elif name in side:
            found[name] = digest_of(path)
        else:
            facts = os.stat(path)
            found[name] = facts.st_size, facts.st_mtime_ns, sample_sha256(path)
    return found
