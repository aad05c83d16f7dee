"""What differs between macOS and Linux, each behind one plain function."""

import errno
import fcntl
import mmap
import os
import resource
import sys
from pathlib import Path

import mlx.core as mx
import psutil

# fcntl commands of macOS; Python names F_NOCACHE only there, F_RDAHEAD nowhere.
F_RDAHEAD = 45
F_NOCACHE = 48


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
        return os.open(path, flags), False
    if sys.platform == "darwin":
        fd = os.open(path, flags)
        try:
            fcntl.fcntl(fd, F_NOCACHE, 1)
            fcntl.fcntl(fd, F_RDAHEAD, 0)
        except OSError:
            return fd, False
        return fd, True

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
    return os.open(path, flags), False


def peak_process_bytes() -> int:
    """The most resident memory this process has had, in bytes."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux hands ru_maxrss on to children, exec or not: it may be the parent's.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def usable_memory_bytes() -> int:
    """What a run may take without harming the machine: nine tenths of what is free.

    On Apple silicon the GPU's recommended working set bounds it as well.
    """
    free = psutil.virtual_memory().available
    working_set = mx.device_info().get("max_recommended_working_set_size", free)
    return int(0.9 * min(free, working_set))
