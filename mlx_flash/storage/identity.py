"""Whether files are still those that were there when a model was loaded."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import FlashError


class Identities:
    """Which files lie at some paths, and in which state."""

    def __init__(self, paths: Iterable[Path]):
        self._files = {path: _identity(path) for path in paths}

    def __iter__(self) -> Iterator[Path]:
        return iter(self._files)

    def check(self) -> None:
        """Refuse what was read from a file that was written anew: it is another model.

        To be asked after a read: whatever was written before it shows in the time.

        Raises:
            FlashError: If a file changed, was exchanged or is gone.
        """
        for path, before in self._files.items():
            if _identity(path) != before:
                raise FlashError(
                    f"{path} changed while its model was in use. Load the model again."
                )


def _identity(path: Path) -> tuple[int, ...] | None:
    """None where there is no such file."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def identity(file: Path) -> list[int]:
    """Size and times of change of a file; the last of them cannot be set back."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
