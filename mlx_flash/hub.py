"""Find a model: a local folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import FlashError

CONFIG_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
REPO_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def find_model(
    name: str | Path, revision: str | None = None, files: tuple[str, ...] = ("ffn/*",)
) -> Path:
    """A local folder as it is, or a hub repository downloaded to the hub's own cache.

    Args:
        name: A path, or `owner/repository`.
        revision: Branch, tag or commit of a hub repository.
        files: Patterns of weight files wanted besides configuration, tokenizer and
            `*.safetensors`.

    Raises:
        FlashError: If it is neither, or the hub cannot be reached or refuses.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FlashError(f"{path} is a file; a model is a folder with config.json.")
    if isinstance(name, Path) or not REPO_NAME.fullmatch(str(name)):
        raise FlashError(
            f"{name} does not exist. Give a model's folder or a hub name such as "
            "facebook/opt-6.7b."
        )
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                str(name),
                revision=revision,
                allow_patterns=[*CONFIG_FILES, "*.safetensors", *files],
            )
        )
    except GatedRepoError as error:
        raise FlashError(
            f"{name} is gated: accept its licence on huggingface.co and log in "
            "(hf auth login), then run the command again."
        ) from error
    except RepositoryNotFoundError as error:
        raise FlashError(
            f"The hub has no model {name} (or it is private: hf auth login), and "
            "there is no such folder."
        ) from error
    except RevisionNotFoundError as error:
        raise FlashError(f"{name} has no revision {revision!r} on the hub.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise FlashError(
            f"{name} is no local folder, and the Hugging Face hub could not be reached "
            "to download it. Check the name and the network."
        ) from error
