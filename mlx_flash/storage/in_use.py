"""Whether a process uses a flash folder: who loads it holds a lock on its flash.json.

The lock goes with the process, however it ends. It keeps nobody from reading.
"""

import contextlib
import fcntl
import os
from pathlib import Path

from .manifest import MANIFEST


def hold(folder: Path) -> int | None:
    """Say that this process uses the folder.

    Returns:
        What `let_go` takes when it no longer does. None if the folder is no
        flash folder, or lies on a file system without locks.
    """
    try:
        file = os.open(folder / MANIFEST, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


def let_go(held: int | None) -> None:
    """This process no longer uses what `hold` was asked for."""
    if held is not None:
        os.close(held)


def is_held(folder: Path) -> bool:
    """Whether any process uses the folder, this one included."""
    with contextlib.suppress(FileNotFoundError), open(folder / MANIFEST, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False
