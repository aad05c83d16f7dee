"""Hold memory, so that others on this machine have only so much left.

The holding is done by a small process of its own, which ends when its standard input
does: also when the program that started it is killed.
"""

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from ...errors import FlashError

READY = "ready"


@contextmanager
def limited_memory(left_bytes: int) -> Iterator[Callable[[], None]]:
    """Leave `left_bytes` of the memory that is available now.

    Raises:
        FlashError: If so much is not there, if it cannot be held, or if the system
            took it back in the meantime, which makes what was measured worthless.
    """
    available = psutil.virtual_memory().available
    if available < left_bytes:
        raise FlashError(
            f"{left_bytes / 1e9:.1f} GB are to be left free, this machine has "
            f"{available / 1e9:.1f} GB. Close other programs, or give less --memory."
        )
    with hold_back(available - left_bytes) as check:
        yield check


@contextmanager
def hold_back(nbytes: int) -> Iterator[Callable[[], None]]:
    """Hold `nbytes` for as long as the block runs.

    Yields:
        A function that raises a FlashError if the system took the memory back in the
        meantime.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(nbytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout

    def check() -> None:
        if process.poll() is not None:
            raise FlashError(
                "The system ended the process that held memory back, so memory was not "
                "limited. Close other programs, or give more --memory."
            )

    try:
        said = process.stdout.readline().strip()
        if said != READY:
            raise FlashError(
                f"{nbytes / 1e9:.1f} GB could not be held ({said or 'ended early'}). "
                "Raise the limit (ulimit -l unlimited), or use --no-ballast."
            )
        yield check
        check()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def hold(nbytes: int) -> None:
    """Body of the process: hold, say so, and wait for the end of standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    offer_to_the_killer()
    if nbytes:
        # Private: Linux, out of memory, is slow to get shared pages back, and has been
        # seen to end the program that was measured as well.
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if reason := lock(memory, nbytes):
            if psutil.swap_memory().total:
                print(f"mlock: {reason}", flush=True)
                return
            for page in range(0, nbytes, mmap.PAGESIZE):  # without swap it stays
                memory[page] = 1
    print(READY, flush=True)
    sys.stdin.read()


def lock(memory: mmap.mmap, nbytes: int) -> str | None:
    """Keep a mapping in memory; the system's reason if it will not."""
    import ctypes
    import resource

    try:
        most = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        if most == resource.RLIM_INFINITY or most >= nbytes:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
    except (ValueError, OSError):
        pass  # mlock itself will say
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes)):
        return os.strerror(ctypes.get_errno())
    return None


def offer_to_the_killer() -> None:
    """If Linux runs out of memory, it shall end this process and no other."""
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")


if __name__ == "__main__":
    hold(int(sys.argv[1]))
