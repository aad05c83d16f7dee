"""Files that may be anything: a pipe never ends, and /dev/zero has no end either."""

import fcntl
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import FlashError, reason_of

MAX_JSON_BYTES = 100_000_000  # the limit that safetensors sets to its headers


def file_bytes(path: Path) -> int:
    """The size of a regular file, or of the one that a link leads to.

    Raises:
        FlashError: If it is a folder, a pipe or a device.
        OSError: If there is none.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise FlashError(
            f"{path} is a folder, a pipe or a device where a file should be. Restore "
            "the file from a copy, or download or convert the model again."
        )
    return found.st_size


def cache_folder() -> Path:
    """Where this user's caches and records are.

    `MLX_FLASH_CACHE`, or `mlx-flash` below `XDG_CACHE_HOME` or `~/.cache`.
    """
    if named := os.environ.get("MLX_FLASH_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mlx-flash"


def to_disk(fd: int) -> None:
    """Have the bytes of an open file, or the names in an open folder, on disk.

    macOS's fsync leaves them in the disk's own memory, which a loss of power empties.
    """
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
        except OSError:  # a file system that has no such thing
            pass
    os.fsync(fd)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        to_disk(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Make a folder and those that it lies in, with their names on disk."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    if made:
        path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(made):
        sync(folder.parent)


@contextmanager
def written_whole(path: Path, part: Path | None = None) -> Iterator[Path]:
    """A file to write in the place of `path`, which takes its name once it is on disk.

    Args:
        path: The final name. Its folder is made if need be.
        part: The name until then, in the same folder.

    Raises:
        OSError: If the system refuses; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part or path.with_name(path.name + ".part")
    try:
        yield part
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all. Its folder is made if need be.

    Raises:
        OSError: If the system refuses; what was there before is untouched.
    """
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FlashError: If it cannot be read, is too large or is no JSON.
        FileNotFoundError: If there is none.
    """
    try:
        if file_bytes(path) > MAX_JSON_BYTES:
            raise FlashError(
                f"{path} has more than {MAX_JSON_BYTES:,} bytes, as no such file has."
            )
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise FlashError(f"{path} cannot be read: {reason_of(error)}.") from error
