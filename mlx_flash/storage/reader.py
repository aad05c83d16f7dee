"""Open the best reader there is: C's, or Python's where the extension is not built."""

from ..errors import FlashError
from . import native_reader
from .base_reader import Reader, ReadResult, Ticket
from .extents import Extent, Places, Region
from .native_reader import NativeReader
from .python_reader import PythonReader

__all__ = [
    "Extent",
    "Places",
    "ReadResult",
    "Reader",
    "Region",
    "Ticket",
    "open_reader",
]


def open_reader(
    threads: int = 32,
    *,
    direct: bool = True,
    native: bool | None = None,
    max_gap_bytes: int = 0,
) -> Reader:
    """Start the threads that read.

    Args:
        threads: How many reads are in flight at once.
        direct: Read around the page cache where the file system can.
        native: True for the C reader or an error, False for Python's, None for
            the best there is.
        max_gap_bytes: The C reader merges two reads when no more than this lies
            between them.

    Raises:
        FlashError: If the C reader was asked for and is not there, or its threads
            cannot be started.
    """
    if not 1 <= threads <= 1024:
        raise ValueError(f"{threads} threads are not in [1, 1024]")
    if max_gap_bytes < 0:
        raise ValueError(f"a gap of {max_gap_bytes} bytes is less than none")
    built = native_reader._reader is not None
    if native and not built:
        raise FlashError(
            "The C reader is not built. With a C compiler at hand, install again: "
            "pip install --force-reinstall --no-binary :all: --no-deps "
            "mlx-llm-in-a-flash"
        )
    if native is False or not built:
        return PythonReader(threads, direct)
    try:
        return NativeReader(threads, direct, max_gap_bytes)
    except OSError as error:
        raise FlashError(
            f"{threads} reader threads cannot be started: {error.strerror}. Try fewer."
        ) from error
