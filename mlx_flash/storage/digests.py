"""SHA-256 of a file: of all its bytes, or of a few pieces of it."""

import hashlib
from pathlib import Path

from .files import file_bytes

READ_BYTES = 1 << 22
PIECES = 8
PIECE_BYTES = 16_384


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sample_sha256(path: Path) -> str:
    """SHA-256 of eight pieces of a file of 16 KiB each, evenly spread.

    This costs the same for files of all sizes. It tells another file of the same size,
    and one whose end never came. A byte that changed between two pieces it does not
    see. Of up to 128 KiB the pieces cover everything.

    Raises:
        FlashError: If it is no regular file.
        OSError: If it cannot be read.
    """
    last = max(file_bytes(path) - PIECE_BYTES, 0)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for i in range(PIECES):
            file.seek(i * last // (PIECES - 1))
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()
