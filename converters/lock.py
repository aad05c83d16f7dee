"""One conversion into a destination at a time, and a note that outlives a kill.

The file is locked while a conversion runs, and is the last thing that goes. Its note
says that the destination is finished, so that what a kill left undone after that (the
clean-up, the deletion of the source) is done by the same command.
"""

import fcntl
import json
import os
from pathlib import Path

from ..errors import FlashError
from ..storage.files import make_folder, sync, to_disk
from ..storage.safetensors import write_error


class Lock:
    """Hold it with `with`.

    Attributes:
        note: What an earlier conversion wrote that did not come to its end, or {}.
    """

    def __init__(self, dst: Path):
        self.dst = dst
        self.path = dst.with_name(dst.name + ".mlx-flash-lock")
        self.note: dict = {}

    def __enter__(self) -> "Lock":
        try:
            make_folder(self.path.parent)
            while not self._taken():
                pass
        except OSError as error:
            raise write_error(self.path, error) from error
        try:
            self.note = dict(json.loads(os.pread(self._file, 1 << 24, 0)))
        except (ValueError, TypeError):  # empty, or the machine stopped as it was made
            self.note = {}
        return self

    def _taken(self) -> bool:
        """Lock the file; False if the one who had it deleted it meanwhile."""
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._file).st_ino == self.path.stat().st_ino:
                return True
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(self._file)
            raise FlashError(
                f"Another conversion to {self.dst} is running. Wait for its end, or "
                "choose another folder."
            ) from None
        os.close(self._file)
        return False

    def write(self, note: dict) -> None:
        """Keep `note` until the conversion has ended, over a power loss as well."""
        self.note = note
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(note).encode() if note else b"", 0)
        to_disk(self._file)
        sync(self.path.parent)

    def __exit__(self, kind: type | None, *_) -> None:
        refused = kind is not None and issubclass(kind, FlashError)
        if kind is None or refused or not self.note:
            if self.note:
                sync(self.path.parent)  # what the note says is done, is done on disk
            self.path.unlink(missing_ok=True)
        os.close(self._file)
