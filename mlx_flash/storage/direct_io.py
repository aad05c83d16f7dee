"""Files read and written around the page cache, on macOS and on Linux."""

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

# fcntl commands of macOS; Python names F_NOCACHE only there, F_RDAHEAD nowhere.
F_RDAHEAD = 45
F_NOCACHE = 48
MS_INVALIDATE = 2  # the same number in both systems
MAP_FAILED = ctypes.c_void_p(-1).value


def open_uncached(path: str | Path, direct: bool) -> tuple[int, bool]:
    """Open a file for reading around the operating system's page cache.

    Args:
        path: The file.
        direct: False leaves the page cache on.

    Returns:
        The file descriptor, and whether reads on it go around the cache. A file
        system that cannot do that (tmpfs, some network mounts) is read buffered.

    Raises:
        OSError: The file cannot be opened or read at all.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC
    if not direct:
        fd = os.open(path, flags)
        _ask_for_no_more(fd)
        return fd, False
    if sys.platform == "darwin":
        fd = os.open(path, flags)
        try:
            fcntl.fcntl(fd, F_NOCACHE, 1)
        except OSError:
            direct = False
        _ask_for_no_more(fd)
        return fd, direct

    fd = -1
    try:
        fd = os.open(path, flags | os.O_DIRECT)
        # Some file systems open with O_DIRECT and refuse only the first read.
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            os.preadv(fd, [page], 0)
        return fd, True
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    return open_uncached(path, False)


def _ask_for_no_more(fd: int) -> None:
    """Turn read-ahead off: units are asked for in no order, and long in themselves.

    What comes along would push out of the page cache what is asked for again: with room
    for three quarters of the experts, 15 ms of reading a token became 10.
    """
    with contextlib.suppress(OSError):
        if sys.platform == "darwin":
            fcntl.fcntl(fd, F_RDAHEAD, 0)
        else:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def open_for_writing_uncached(path: str | Path) -> BinaryIO:
    """A new file whose bytes macOS is asked not to keep; Linux drops them later."""
    file = open(path, "wb")
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):
            fcntl.fcntl(file.fileno(), F_NOCACHE, 1)
    return file


def cached_share(path: str | Path) -> float | None:
    """The share of a file's pages that the system holds in memory; None: unknown."""
    size = os.path.getsize(path)
    pages = -(-size // mmap.PAGESIZE)
    if not pages:
        return None
    flags = (ctypes.c_ubyte * pages)()
    with _mapped(path, size) as address:
        # mincore lives in libSystem and in libc, under this name in both.
        if address is None or _libc().mincore(address, ctypes.c_size_t(size), flags):
            return None
    # Bit 0 is "in memory"; macOS keeps other facts in the higher ones.
    return float((np.frombuffer(bytes(flags), np.uint8) & 1).mean())


def cached_before(paths: Iterable[Path], direct: bool) -> float | None:
    """The share of files that reads can find in memory; None: unknown.

    Args:
        direct: Whether they go around the page cache. Linux then asks the disk
            whatever is in memory; macOS takes what is there.
    """
    if direct and sys.platform != "darwin":
        return 0.0
    cached, total = 0.0, 0
    for path in paths:
        size = os.path.getsize(path)
        share = cached_share(path)
        if share is None:
            return None
        cached += share * size
        total += size
    return cached / total if total else None


def drop_cached(path: str | Path) -> None:
    """Ask the system to forget a file's clean pages; `cached_share` says if it did."""
    if sys.platform == "darwin":
        size = os.path.getsize(path)
        with _mapped(path, size) as address:
            if address is not None:
                _libc().msync(address, ctypes.c_size_t(size), MS_INVALIDATE)
        return
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    return libc


@contextlib.contextmanager
def _mapped(path: str | Path, size: int) -> Iterator[ctypes.c_void_p | None]:
    """The address of a file mapped for reading, or None if it cannot be."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        address = _libc().mmap(
            None,
            ctypes.c_size_t(size),
            mmap.PROT_READ,
            mmap.MAP_SHARED,
            fd,
            ctypes.c_longlong(0),
        )
    finally:
        os.close(fd)
    if not size or address in (None, MAP_FAILED):
        yield None
        return
    try:
        yield ctypes.c_void_p(address)
    finally:
        _libc().munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
