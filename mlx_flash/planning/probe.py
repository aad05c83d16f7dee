"""Measure this machine: its flash as the reader uses it, its memory, its MLX.

Random reads of several lengths with several in flight, through mlx-flash's own readers,
around the page cache. No byte is read twice, so that no cache can answer; whether one
might have done so all the same is said with the figures.
"""

import contextlib
import datetime
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import psutil

from .._version import __version__
from ..errors import FlashError
from ..memory.allocation import allocate
from ..storage import direct_io
from ..storage.files import cache_folder
from ..storage.limits import MERGE_BYTES
from ..storage.reader import Extent, open_reader
from . import kernels, machine
from .profile import PROFILE_VERSION, FlashPoint, Profile

BLOCKS = (4096, 16384, 65536, 262144, 1 << 20)
THREADS = (1, 4, 16, 32)
POINT_S = 0.35  # the longest that one point is measured
FILE_BYTES = 1 << 32
WRITE_S = 5.0  # after which a temporary file is long enough
LEAST_BYTES = 1 << 28
STRIPE = 1 << 22  # what is dealt out to the points
SEQUENTIAL_BYTES = 1 << 29
CACHED_SHARE = 0.01  # of a file's pages that may be in memory


@dataclass(frozen=True)
class Deal:
    """The blocks of one point: for each file, which of its blocks to read."""

    block_bytes: int
    threads: int
    blocks: list[np.ndarray]


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
    with contextlib.ExitStack() as stack:
        if folder is None:
            say("writing a temporary file")
            files = [stack.enter_context(_temporary_file(cache_folder()))]
        else:
            files = _files(folder)
        say("reading the flash")
        _make_cold(files, notes)
        points, sequential = measure_flash(files, notes)
    say("multiplying")
    name, system = machine.machine()
    cache_layer_s, cache_slot_s = kernels.cache_costs()
    return Profile(
        profile_version=PROFILE_VERSION,
        device=f"{name}, MLX on {mx.default_device().type.name}",
        os=system,
        source=f"mlx-flash probe {__version__}, {datetime.date.today()}",
        cold=not notes,
        notes=tuple(dict.fromkeys(notes)),
        memory_bytes=psutil.virtual_memory().total,
        flash=tuple(points),
        sequential_bytes_per_s=sequential,
        memory_bytes_per_s=kernels.memory_bytes_per_s(),
        rates=tuple(kernels.measure_rates()),
        layer_s=kernels.layer_s(),
        cache_layer_s=cache_layer_s,
        cache_slot_s=cache_slot_s,
        copy_bytes_per_s=0.0,
    )


def measure_flash(
    files: list[Path], notes: list[str]
) -> tuple[list[FlashPoint], float]:
    """(random reads, sequential bytes per second) of `files`, each offset once."""
    sizes = [os.path.getsize(file) for file in files]
    stripes = [(i, n) for i, size in enumerate(sizes) for n in range(size // STRIPE)]
    # The end of the largest file is read in order, the rest is dealt out at random.
    largest = int(np.argmax(sizes))
    whole = sizes[largest] // STRIPE
    tail = max(min(SEQUENTIAL_BYTES, sizes[largest] // 4) // STRIPE, 1)
    kept = [s for s in stripes if s[0] != largest or s[1] < whole - tail]
    points = [
        _measure(files, sizes, deal, notes) for deal in deals(kept, len(files), 0)
    ]
    order = np.arange((whole - tail) * 4, whole * 4)
    blocks = [order if i == largest else order[:0] for i in range(len(files))]
    in_order = Deal(STRIPE // 4, max(THREADS), blocks)
    return points, _measure(files, sizes, in_order, notes).bytes_per_s


def deals(stripes: list[tuple[int, int]], files: int, seed: int) -> Iterator[Deal]:
    """Share out stripes (file, number) among the points, more of them to long blocks.

    A point's blocks come in random order. Short ones are every other block of their
    stripes, so that the reader merges no two of them.
    """
    rng = np.random.default_rng(seed)
    stripes = [stripes[i] for i in rng.permutation(len(stripes))]
    grid = [(block, threads) for block in BLOCKS for threads in THREADS]
    weights = np.array([block**0.4 for block, _ in grid])
    spare = len(stripes) - len(grid)  # one for each point, the rest by weight
    ends = np.cumsum(1 + np.floor(spare * weights / weights.sum()).astype(int))
    for (block, threads), start, end in zip(grid, [0, *ends[:-1]], ends, strict=True):
        chosen: list[list[np.ndarray]] = [[] for _ in range(files)]
        step = 2 if block < MERGE_BYTES else 1
        for file, stripe in stripes[start:end]:
            first = stripe * STRIPE // block
            chosen[file].append(np.arange(first, first + STRIPE // block, step))
        blocks = [np.concatenate(c) if c else np.arange(0) for c in chosen]
        yield Deal(block, threads, [rng.permutation(b) for b in blocks])


def _measure(
    files: list[Path], sizes: list[int], deal: Deal, notes: list[str]
) -> FlashPoint:
    """Read a deal's blocks, two batches in flight, until all or the time is used."""
    block = deal.block_bytes
    rows = int(np.clip((1 << 24) // block, deal.threads, 512))
    _, slots = allocate((2 * rows, block), mx.uint8)
    batches = (
        (file, units[start : start + rows])
        for file, units in enumerate(deal.blocks)
        for start in range(0, len(units), rows)
    )
    done_bytes = 0
    with open_reader(deal.threads, direct=True) as reader:
        sources = [
            reader.add_source(
                [Extent(f, 0, block, ((0, 0, block),))], [slots], s // block
            )
            for f, s in zip(files, sizes, strict=True)
        ]
        if not reader.direct:
            notes.append("this file system has no direct I/O: the page cache took part")
        flying: deque = deque()
        half = 0
        begin = time.perf_counter()
        for file, units in batches:
            places = np.arange(len(units)) + half * rows
            flying.append(reader.submit(sources[file], units, places))
            half = 1 - half
            if len(flying) == 2:  # the next batch takes the place of the older one
                done_bytes += reader.wait(flying.popleft()).bytes_read
            if time.perf_counter() - begin > POINT_S:
                break
        while flying:
            done_bytes += reader.wait(flying.popleft()).bytes_read
        seconds = time.perf_counter() - begin
    if not done_bytes:
        raise FlashError(
            f"{files[0].parent} holds too little to measure reads of {block:,} bytes. "
            "Leave the folder out: mlx-flash probe"
        )
    speed = done_bytes / seconds
    return FlashPoint(block, deal.threads, speed, speed / block)


def _files(folder: Path) -> list[Path]:
    """The folder's weight files, the largest first."""
    if not folder.is_dir():
        raise FlashError(
            f"{folder} is no folder. Name a model's folder, or leave it out to measure "
            "a temporary file."
        )
    found = [(p.stat().st_size, p) for p in folder.rglob("*.safetensors")]
    found = sorted((f for f in found if f[0] >= STRIPE), reverse=True)
    total = sum(size for size, _ in found)
    if total < LEAST_BYTES:
        raise FlashError(
            f"{folder} has {total / 1e6:,.0f} MB of weights, a measurement needs "
            f"{LEAST_BYTES / 1e6:,.0f} MB. Leave it out to measure a temporary file: "
            "mlx-flash probe"
        )
    return [path for _, path in found[:64]]


@contextlib.contextmanager
def _temporary_file(folder: Path) -> Iterator[Path]:
    """A file of random bytes, which is gone afterwards whatever happens."""
    path = folder / f"probe-{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        size = min(FILE_BYTES, free // 4) // STRIPE * STRIPE
        if size < LEAST_BYTES:
            raise FlashError(
                f"{folder} has {free / 1e9:.1f} GB free, a measurement needs four "
                f"times {LEAST_BYTES / 1e9:.1f} GB. Name a model's folder to read "
                "instead: mlx-flash probe FOLDER"
            )
        rng = np.random.Generator(np.random.SFC64())
        with direct_io.open_for_writing_uncached(path) as file:
            begin = time.perf_counter()
            for written in range(0, size, STRIPE):
                late = time.perf_counter() - begin > WRITE_S
                if late and written >= LEAST_BYTES:
                    break
                file.write(rng.bytes(STRIPE))
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
