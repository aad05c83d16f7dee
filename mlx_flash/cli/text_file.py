"""A text that somebody names on the command line."""

from pathlib import Path

from ..errors import FlashError


def read_text(path: Path) -> str:
    """The text in a file of UTF-8.

    Raises:
        FlashError: If it cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FlashError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise FlashError(
            f"{path} is not text in UTF-8. Convert it first, with iconv for example."
        ) from error
