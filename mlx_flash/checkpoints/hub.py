"""Find a model: a local folder, or a repository on the Hugging Face hub.

All functions raise a FlashError if the hub cannot be reached or refuses.
"""

import contextlib
import errno
import fnmatch
import json
import re
import sys
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

from ..demo_models import demo_model
from ..errors import FlashError
from ..storage.manifest import MANIFEST, PREDICTORS, RESIDENT
from .config import CONFIG_FILES

FLASH_FILES = [RESIDENT, PREDICTORS, "ffn/*"]
# A checkpoint's weights: the first pattern that a repository has something for.
WEIGHT_FILES = ["model*.safetensors", "pytorch_model*.bin"]
REPO_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def find_model(
    name: str | Path,
    revision: str | None = None,
    checkpoint: bool | Callable[[Path], bool] = False,
) -> Path:
    """A local folder as it is, or a hub repository downloaded to the hub's own cache.

    Args:
        name: A path, `owner/repository`, or a name of `demo_models`.
        revision: Branch, tag or commit of a hub repository.
        checkpoint: Whether a repository's ordinary weights are wanted, or a function
            that decides it from a folder with its configuration; without, it must be
            a flash folder. All this is judged before anything large comes.

    Raises:
        FlashError: If it is neither, or the hub cannot be reached or refuses.
    """
    name = demo_model(name) or name
    folder = find_config(name, revision)
    if Path(name).expanduser() == folder:
        return folder
    # From here on the commit is named, so that all files are of one revision.
    name, commit = str(name), folder.name
    if (folder / MANIFEST).exists():
        return _download(name, commit, FLASH_FILES)
    if not (checkpoint(folder) if callable(checkpoint) else checkpoint):
        raise FlashError(
            f"{name} on the hub is not a flash folder (no {MANIFEST}). Make one: "
            f"mlx-flash convert {name} -o {name.split('/')[1]}-flash"
        )
    if not has_weights(folder) and not sys.stderr.isatty():
        print(f"downloading the weights of {name}", file=sys.stderr, flush=True)
    for pattern in WEIGHT_FILES:
        _download(name, commit, [pattern])
        if any(folder.glob(pattern)):
            break
    return folder


def find_config(name: str | Path, revision: str | None = None) -> Path:
    """A local folder as it is, or a hub repository's configuration without weights."""
    path = demo_model(name) or Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FlashError(f"{path} is a file; a model is a folder with config.json.")
    if isinstance(name, Path) or not REPO_NAME.fullmatch(str(name)):
        raise FlashError(
            f"{name} does not exist. Give a model's folder or a hub name such as "
            "facebook/opt-6.7b."
        )
    return _download(str(name), revision, CONFIG_FILES)


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights, all of them where an index names them."""
    index = folder / "model.safetensors.index.json"
    try:
        named = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES)
    return all((folder / str(name)).is_file() for name in named)


def hub_cache() -> Path:
    """Where the hub's library keeps what it downloaded."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def weight_sizes(name: str, commit: str) -> dict[str, int]:
    """The bytes of a repository's weight files by name, as the hub lists them."""
    sizes = {f.path: f.size for f in _listed(name, commit)}
    for patterns in [FLASH_FILES] if MANIFEST in sizes else [[p] for p in WEIGHT_FILES]:
        found = {
            path: size
            for path, size in sizes.items()
            if any(fnmatch.fnmatch(path, pattern) for pattern in patterns)
        }
        if found:
            break
    return found


def file_ids(name: str, commit: str) -> dict[str, str]:
    """The hub's digest of each file of a repository that a model is read from."""
    patterns = [*CONFIG_FILES, *WEIGHT_FILES]
    return {
        f.path: f.lfs.sha256 if f.lfs else f.blob_id
        for f in _listed(name, commit)
        if any(fnmatch.fnmatch(f.path, pattern) for pattern in patterns)
    }


def _listed(name: str, commit: str) -> list[Any]:
    """The files of a repository, as the hub lists them without sending them."""
    from huggingface_hub import HfApi, constants

    with _said(name, commit):
        files = HfApi(endpoint=constants.ENDPOINT).list_repo_tree(
            name, revision=commit, recursive=True
        )
        return [file for file in files if hasattr(file, "size")]


def remote_tensors(name: str, file: str, commit: str) -> dict[str, tuple[str, int]]:
    """(dtype, values) of each tensor of one file on the hub, read from its header."""
    from huggingface_hub import HfApi, constants

    with _said(name, commit):
        found = HfApi(endpoint=constants.ENDPOINT).parse_safetensors_file_metadata(
            name, file, revision=commit
        )
    return {k: (t.dtype, prod(t.shape)) for k, t in found.tensors.items()}


def _download(name: str, revision: str | None, files: list[str]) -> Path:
    """The hub's snapshot of a repository, with the files of these patterns in it."""
    from huggingface_hub import snapshot_download

    with _said(name, revision), _no_bars_in_logs():
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))


@contextlib.contextmanager
def _no_bars_in_logs() -> Iterator[None]:
    """Without a terminal, the hub's library would fill a log with its bars."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _said(name: str, revision: str | None) -> Iterator[None]:
    """Say in one line what the hub or its library refused."""
    from huggingface_hub import errors

    try:
        yield
    except Exception as error:  # each version of the library has its own HTTP client's
        if isinstance(error, errors.GatedRepoError):
            refusal = (
                f"{name} is gated: accept its licence on huggingface.co and log in "
                "(hf auth login), then run the command again."
            )
        elif isinstance(error, errors.RepositoryNotFoundError):
            refusal = (
                f"The hub has no model {name} (or it is private: hf auth login), and "
                "there is no such folder."
            )
        elif isinstance(error, errors.RevisionNotFoundError):
            refusal = f"{name} has no revision {revision!r} on the hub."
        elif getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            refusal = (
                f"The disk is full: {name} could not be downloaded. Free some space or "
                "set HF_HOME to another disk, then run the command again."
            )
        else:
            refusal = (
                f"{name} is no local folder, and could not be downloaded from the "
                f"Hugging Face hub ({type(error).__name__}). Check the name and the "
                "network."
            )
        raise FlashError(refusal) from error
