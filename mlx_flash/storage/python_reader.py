"""The reader in Python, for where the C extension was not built: the same bytes.

A thread reads one unit at a time, or a piece of a long one. Units at a fixed stride are
not merged, which the C reader does: Python would spend on planning what merging saves.
"""

import contextlib
import errno
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .base_reader import SHORT_READ, Reader
from .extents import ABSENT, Places
from .limits import CHUNK_BYTES, PAGE_BYTES
from .source import Source, address

BUFFERS = threading.local()  # one of each thread, on a page


@dataclass(slots=True)
class Job:
    """One read: `size` bytes at `offset` of an extent's file.

    `pieces` are (offset in the read, destination), in order, with padding between them.
    """

    extent: int
    offset: int
    size: int
    pieces: list[tuple[int, np.ndarray]]


@dataclass(eq=False)
class Batch:
    """A batch in flight. All but `jobs` is changed by threads of the pool alone.

    The thread that waits takes no lock that they need: Ctrl-C might come while it has
    it. `done` is locked until `left`, the number of jobs that have not ended, is zero.
    """

    source: Source
    jobs: deque[Job]
    submitted: float
    left: int
    first: "deque[Batch]"  # whose jobs go before its own
    done: Any = field(default_factory=threading.Lock)
    changes: Any = field(default_factory=threading.Lock)
    bytes_read: int = 0
    reads: int = 0
    ended: float = 0.0
    failure: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)


class PythonReader(Reader):
    """A pool of Python threads. Python lets go of its lock while a thread reads."""

    native = False

    def __init__(self, threads: int, direct: bool):
        super().__init__(direct)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "mlx-flash-reader")
        self._batches: set[Batch] = set()
        self._needed: deque[Batch] = deque(maxlen=1)  # the last that is no guess
        self._pid = os.getpid()
        self._stop_with(_abandon, self._pool, self._batches)

    def close(self) -> None:
        if self._stop.alive and self._pid == os.getpid():
            self._pool.shutdown(wait=True)
        super().close()

    def _register(self, source: Source) -> Source:
        return source

    def _move(self, registered: Source, source: Source) -> Source:
        return source

    def _submit(
        self, registered: Source, units: np.ndarray, slots: np.ndarray, guess: bool
    ) -> Batch:
        self._check_process()
        submitted = time.perf_counter()
        _check_ids(registered, units, slots)
        jobs = deque(_jobs(registered, units, slots))
        first: deque[Batch] = self._needed if guess else deque()
        ended = submitted
        batch = Batch(registered, jobs, submitted, len(jobs), first, ended=ended)
        if not guess:
            self._needed.append(batch)
        batch.done.acquire()
        self._batches.add(batch)
        for _ in range(min(self._threads, len(jobs))):
            self._pool.submit(_work, batch)
        return batch

    def _wait(self, handle: Batch) -> tuple:
        self._check_process()
        if handle.left:
            handle.done.acquire()
        self._batches.discard(handle)
        seconds = handle.ended - handle.submitted
        return handle.bytes_read, handle.reads, seconds, *handle.failure

    def _drain(self) -> None:
        self._check_process()
        for batch in list(self._batches):
            # An exception may have come before any thread was told of the batch.
            self._pool.submit(_work, batch)
            self._wait(batch)

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise ValueError(
                "the reader was opened before a fork; "
                "open another one in the child process"
            )


def _abandon(pool: ThreadPoolExecutor, batches: set[Batch]) -> None:
    """End a reader that nobody closed, without waiting for its threads.

    Garbage collection may run this in any thread, also in one that holds a lock which
    the pool's threads need: waiting for them here has been seen to hang.
    """
    for batch in batches:
        batch.jobs.clear()
    pool.shutdown(wait=False)


def _jobs(source: Source, units: np.ndarray, slots: np.ndarray) -> Iterator[Job]:
    """The reads of a batch in file order; long units are cut for several threads."""
    order = np.argsort(units, kind="stable")
    picks = list(zip(units[order].tolist(), slots[order].tolist(), strict=True))
    for number, extent in enumerate(source.extents):
        if isinstance(extent, Places):
            yield from _jobs_of_places(source, number, extent, picks)
            continue
        for unit, slot in picks:
            begin = extent.offset + unit * extent.stride
            rows = [
                (begin + at, source.slots[index][slot]) for index, at, _ in extent.parts
            ]
            yield from _jobs_of_run(number, rows)


def _jobs_of_places(
    source: Source, number: int, extent: Places, picks: list[tuple[int, int]]
) -> Iterator[Job]:
    """The reads of parts at places of their own; neighbours become one read."""
    rows = [
        (at, source.slots[index][slot])
        for unit, slot in picks
        for (index, _, _), at in zip(
            extent.parts, extent.offsets[unit].tolist(), strict=True
        )
        if at != ABSENT
    ]
    run: list[tuple[int, np.ndarray]] = []
    for at, row in sorted(rows, key=lambda pair: pair[0]):
        begin, last = (run[0][0], run[-1]) if run else (at, (at, row[:0]))
        if at != last[0] + len(last[1]) or at + len(row) - begin > CHUNK_BYTES:
            yield from _jobs_of_run(number, run)
            run = []
        run.append((at, row))
    yield from _jobs_of_run(number, run)


def _jobs_of_run(number: int, rows: list[tuple[int, np.ndarray]]) -> Iterator[Job]:
    """One read for rows (offset in the file, destination), or several if it is long."""
    if not rows:
        return
    first, (last, last_row) = rows[0][0], rows[-1]
    whole = last + len(last_row) - first
    if whole <= CHUNK_BYTES:
        yield Job(number, first, whole, [(at - first, row) for at, row in rows])
        return
    for at, row in rows:
        for cut in range(0, len(row), CHUNK_BYTES):
            piece = row[cut : cut + CHUNK_BYTES]
            yield Job(number, at + cut, len(piece), [(0, piece)])


def _work(batch: Batch) -> None:
    """Read jobs of a batch until none is left; runs in a thread of the pool."""
    while (found := _next_job(batch)) is not None:
        _run(*found)


def _next_job(batch: Batch) -> tuple[Batch, Job] | None:
    for queue in (*tuple(batch.first), batch):
        with contextlib.suppress(IndexError):
            return queue, queue.jobs.popleft()
    return None


def _run(batch: Batch, job: Job) -> None:
    start, asked, got, error = job.offset, job.size, 0, errno.EIO
    try:
        start, asked, got = _read(batch.source, job)
        error = 0 if got >= job.offset + job.size - start else SHORT_READ
    except OSError as failed:
        error = failed.errno or error
    finally:
        with batch.changes:
            batch.reads += 1
            batch.bytes_read += asked
            batch.left -= 1
            if error:  # the batch is lost: leave the rest unread
                batch.failure = error, job.extent, start, asked, got
                batch.left -= _clear(batch.jobs)
            if not batch.left:
                batch.ended = time.perf_counter()
                batch.done.release()


def _clear(jobs: deque[Job]) -> int:
    """Empty a queue that other threads take from; says how many jobs it took."""
    taken = 0
    with contextlib.suppress(IndexError):
        while True:
            jobs.popleft()
            taken += 1
    return taken


def _read(source: Source, job: Job) -> tuple[int, int, int]:
    """Read one job: (offset and bytes asked of the file, bytes it gave)."""
    fd, align, scatter = source.opened[job.extent]
    if _straight(job, scatter if len(job.pieces) > 1 else align):
        views = [row.data for _, row in job.pieces]
        if os.preadv(fd, views, job.offset) == job.size:
            return job.offset, job.size, job.size
    # Direct I/O wants whole pages at both ends, and padding has no place in the slots:
    # such reads go through a buffer of the thread. It also ends what came short.
    if not hasattr(BUFFERS, "array"):
        pages = mmap.mmap(-1, CHUNK_BYTES + 2 * PAGE_BYTES)
        BUFFERS.array = np.frombuffer(pages, np.uint8)
    start = job.offset - job.offset % align
    end = job.offset + job.size
    asked = end + -end % align - start
    got = _fill(fd, BUFFERS.array[:asked], end - start, start, align)
    for at, row in job.pieces:
        begin = job.offset + at - start
        row[:] = BUFFERS.array[begin : begin + len(row)]
    return start, asked, got


def _straight(job: Job, align: int) -> bool:
    """Whether a read can land where its pieces belong, `align` bytes being a page."""
    end = 0
    for at, row in job.pieces:
        if at != end:
            return False
        if (job.offset + at | len(row) | address(row)) % align:
            return False
        end = at + len(row)
    return True


def _fill(fd: int, array: np.ndarray, need: int, offset: int, align: int) -> int:
    """Read until `need` bytes are there or the file ends; Python retries EINTR.

    Not until the array is full: going on rereads part of a page, and a read that comes
    short may spoil what was there behind its end.
    """
    got = 0
    while got < need:
        # Direct I/O that stopped inside of a page goes on from the page's start.
        skip = got - got % align
        done = skip + os.preadv(fd, [array[skip:].data], offset + skip)
        if done <= got:
            break
        got = done
    return got


def _check_ids(source: Source, units: np.ndarray, slots: np.ndarray) -> None:
    for name, ids, limit in (
        ("unit", units, source.n_units),
        ("slot", slots, source.n_slots),
    ):
        wrong = ids[(ids < 0) | (ids >= limit)]
        if wrong.size:
            raise ValueError(f"{name} {wrong[0]} is not in [0, {limit})")
    used, times = np.unique(slots, return_counts=True)
    if times.max(initial=0) > 1:
        twice = used[times.argmax()]
        raise ValueError(f"slot {twice} is twice in a batch of {slots.size}")
