"""Measure this machine: its flash as the reader uses it, its memory, its MLX.

The flash is a model's folder, or a temporary file. Whether a cache might have answered
in its place is said with the figures.
"""

import contextlib
import datetime
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import psutil

from .._version import __version__
from ..errors import FlashError
from ..profile import PROFILE_VERSION, Profile
from ..storage import direct_io
from ..storage.files import cache_folder
from . import kernels, machine, reads

FILE_BYTES = 1 << 32
WRITE_S = 5.0  # after which a temporary file is long enough
LEAST_BYTES = 1 << 28
CACHED_SHARE = 0.01  # of a file's pages that may be in memory


def probe(
    folder: Path | None = None, say: Callable[[str], None] = lambda line: None
) -> Profile:
    """Measure the flash under a folder and the machine, in less than 30 seconds.

    Args:
        folder: A model on the flash in question; without one, a temporary file of
            random bytes in the cache folder.
        say: Is told what is being measured.

    Raises:
        FlashError: If the folder holds too little to measure, or a read fails.
    """
    notes: list[str] = []
    _drop_leftovers(cache_folder())
    with contextlib.ExitStack() as stack:
        if folder is None:
            say("writing a temporary file")
            files = [stack.enter_context(_temporary_file(cache_folder()))]
        else:
            files = _files(folder)
        say("reading the flash")
        _make_cold(files, notes)
        points, buffered, sequential = reads.measure_flash(files, notes)
    say("multiplying")
    name, system = machine.machine()
    cache_layer_s, cache_slot_s = kernels.cache_costs()
    wait_s, launch_s = kernels.wait_costs()
    return Profile(
        profile_version=PROFILE_VERSION,
        device=f"{name}, MLX on {mx.default_device().type.name}",
        os=system,
        source=f"mlx-flash probe {__version__}, {datetime.date.today()}",
        cold=not notes,
        notes=tuple(dict.fromkeys(notes)),
        memory_bytes=psutil.virtual_memory().total,
        flash=tuple(points),
        buffered=tuple(buffered),
        sequential_bytes_per_s=sequential,
        memory_bytes_per_s=kernels.memory_bytes_per_s(),
        rates=tuple(kernels.measure_rates()),
        layer_s=kernels.layer_s(),
        cache_layer_s=cache_layer_s,
        cache_slot_s=cache_slot_s,
        copy_bytes_per_s=0.0,
        wait_s=wait_s,
        launch_s=launch_s,
    )


def _files(folder: Path) -> list[Path]:
    """The folder's weight files, the largest first."""
    if not folder.is_dir():
        raise FlashError(
            f"{folder} is no folder. Name a model's folder, or leave it out to measure "
            "a temporary file."
        )
    found = [(p.stat().st_size, p) for p in folder.rglob("*.safetensors")]
    found = sorted((f for f in found if f[0] >= reads.STRIPE), reverse=True)
    total = sum(size for size, _ in found)
    if total < LEAST_BYTES:
        raise FlashError(
            f"{folder} has {total / 1e6:,.0f} MB of weights, a measurement needs "
            f"{LEAST_BYTES / 1e6:,.0f} MB. Leave it out to measure a temporary file: "
            "mlx-flash probe"
        )
    return [path for _, path in found[:64]]


def _drop_leftovers(folder: Path) -> None:
    """Delete the temporary files of probes that were killed: nobody locks them.

    An empty one may be about to be locked.
    """
    for path in folder.glob("probe-*.tmp"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_size:
                path.unlink()


@contextlib.contextmanager
def _temporary_file(folder: Path) -> Iterator[Path]:
    """A file of random bytes, which is gone afterwards whatever happens.

    After a kill it stays until the next probe. Its lock says that it is in use.
    """
    path = folder / f"probe-{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        size = min(FILE_BYTES, free // 4) // reads.STRIPE * reads.STRIPE
        if size < LEAST_BYTES:
            raise FlashError(
                f"{folder} has {free / 1e9:.1f} GB free, a measurement needs four "
                f"times {LEAST_BYTES / 1e9:.1f} GB. Name a model's folder to read "
                "instead: mlx-flash probe FOLDER"
            )
        rng = np.random.Generator(np.random.SFC64())
        with direct_io.open_for_writing_uncached(path) as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            begin = time.perf_counter()
            for written in range(0, size, reads.STRIPE):
                late = time.perf_counter() - begin > WRITE_S
                if late and written >= LEAST_BYTES:
                    break
                file.write(rng.bytes(reads.STRIPE))
            file.flush()
            os.fsync(file.fileno())
            yield path
    except OSError as error:
        raise FlashError(
            f"{path} cannot be written: {error.strerror or error}. Free some space, or "
            "name a model's folder to read instead: mlx-flash probe FOLDER"
        ) from error
    finally:
        path.unlink(missing_ok=True)


def _make_cold(files: list[Path], notes: list[str]) -> None:
    """Drop the files from the page cache; note what may still have answered."""
    for file in files:
        direct_io.drop_cached(file)
        share = direct_io.cached_share(file)
        # Direct I/O of Linux goes to the disk whatever the page cache holds.
        if sys.platform == "darwin" and (share is None or share > CACHED_SHARE):
            part = "an unknown part" if share is None else f"{share:.0%}"
            notes.append(f"{part} of {file.name} was in the page cache")
    if machine.is_virtual():
        notes.append(
            "this is a virtual machine: its host may have answered from memory"
        )
