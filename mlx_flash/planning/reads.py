"""How fast files are read: random reads of several lengths, with several in flight.

Through mlx-flash's own readers, around the page cache. No byte is read twice, so that
no cache can answer. Some bytes of their own are read through the page cache, twice:
cold, and warm.
"""

import dataclasses
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import FlashError
from ..memory.allocation import allocate
from ..profile import BufferedPoint, FlashPoint
from ..storage.limits import MERGE_BYTES
from ..storage.reader import Extent, open_reader

BLOCKS = (4096, 16384, 65536, 262144, 1 << 20)
THREADS = (1, 4, 16, 32)
POINT_S = 0.35  # the longest that one point is measured
STRIPE = 1 << 22  # what is dealt out to the points
SEQUENTIAL_BYTES = 1 << 29
BUFFERED_BLOCKS = (16384, 262144)
BUFFERED_SHARE = 8  # one of so many stripes is read through the page cache


@dataclass(frozen=True)
class Deal:
    """The blocks of one point: for each file, which of its blocks to read."""

    block_bytes: int
    threads: int
    blocks: list[np.ndarray]


def measure_flash(
    files: list[Path], notes: list[str]
) -> tuple[list[FlashPoint], list[BufferedPoint], float]:
    """(random reads, some through the page cache, sequential bytes per second).

    Of `files`, each offset in one of them alone.
    """
    sizes = [os.path.getsize(file) for file in files]
    stripes = [(i, n) for i, size in enumerate(sizes) for n in range(size // STRIPE)]
    # The end of the largest file is read in order, the rest is dealt out at random.
    largest = int(np.argmax(sizes))
    whole = sizes[largest] // STRIPE
    tail = max(min(SEQUENTIAL_BYTES, sizes[largest] // 4) // STRIPE, 1)
    kept = [s for s in stripes if s[0] != largest or s[1] < whole - tail]
    # Chosen evenly, and before anything else may bring bytes of them into the cache.
    cached = kept[::BUFFERED_SHARE]
    kept = [stripe for i, stripe in enumerate(kept) if i % BUFFERED_SHARE]
    buffered = [
        _measure_buffered(files, sizes, deal)
        for deal in deals(cached, len(files), 0, BUFFERED_BLOCKS, THREADS[-1:])
    ]
    points = [
        _measure(files, sizes, deal, notes)[0] for deal in deals(kept, len(files), 0)
    ]
    order = np.arange((whole - tail) * 4, whole * 4)
    blocks = [order if i == largest else order[:0] for i in range(len(files))]
    in_order = Deal(STRIPE // 4, max(THREADS), blocks)
    return points, buffered, _measure(files, sizes, in_order, notes)[0].bytes_per_s


def deals(
    stripes: list[tuple[int, int]],
    files: int,
    seed: int,
    lengths: Sequence[int] | None = None,
    counts: Sequence[int] | None = None,
) -> Iterator[Deal]:
    """Share out stripes (file, number) among the points, more of them to long blocks.

    A point's blocks come in random order. Short ones are every other block of their
    stripes, so that the reader merges no two of them.

    Args:
        lengths, counts: Of the points; None for all BLOCKS and all THREADS.
    """
    rng = np.random.default_rng(seed)
    stripes = [stripes[i] for i in rng.permutation(len(stripes))]
    grid = [(b, n) for b in lengths or BLOCKS for n in counts or THREADS]
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


def _measure_buffered(files: list[Path], sizes: list[int], deal: Deal) -> BufferedPoint:
    """Read blocks through the page cache, and then again what was read."""
    cold, done_bytes = _measure(files, sizes, deal, None)
    left, blocks = done_bytes // deal.block_bytes, []
    for units in deal.blocks:
        blocks.append(units[:left])
        left -= len(blocks[-1])
    again = dataclasses.replace(deal, blocks=blocks)
    warm, _ = _measure(files, sizes, again, None)
    speeds = cold.bytes_per_s, warm.bytes_per_s
    return BufferedPoint(deal.block_bytes, deal.threads, *speeds)


def _measure(
    files: list[Path], sizes: list[int], deal: Deal, notes: list[str] | None
) -> tuple[FlashPoint, int]:
    """Read a deal's blocks, two batches in flight, until all or the time is used.

    Args:
        notes: Takes what makes a measurement of the flash doubtful. None reads through
            the page cache.

    Returns:
        The point, and how many bytes were read.
    """
    block = deal.block_bytes
    rows = int(np.clip((1 << 24) // block, deal.threads, 512))
    _, slots = allocate((2 * rows, block), mx.uint8)
    batches = (
        (file, units[start : start + rows])
        for file, units in enumerate(deal.blocks)
        for start in range(0, len(units), rows)
    )
    done_bytes = 0
    with open_reader(deal.threads, direct=notes is not None) as reader:
        sources = [
            reader.add_source(
                [Extent(f, 0, block, ((0, 0, block),))], [slots], s // block
            )
            for f, s in zip(files, sizes, strict=True)
        ]
        if notes is not None and not reader.direct:
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
    return FlashPoint(block, deal.threads, speed, speed / block), done_bytes
