"""The reader in Python: a thread pool that plans and reads as `_reader.c` does.

Change both together: a test compares their reads. Words: a piece is a run of bytes
with one destination, a job is one read.
"""

import errno
import mmap
import os
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from .limits import CHUNK_BYTES, MERGE_BYTES, PAGE_BYTES
from .reader import Reader, Source, _address

MERGE_IOVECS = 512  # IOV_MAX is 1024 on macOS and Linux
SHORT_READ = -1  # beside the errnos: the file ends too early


@dataclass(slots=True)
class Job:
    extent: int
    fd: int
    align: int
    start: int  # of the read, aligned
    end: int
    pieces: list[tuple[int, int, memoryview]]  # (file offset, bytes, destination)
    iovecs: int
    straight: bool  # lands in the slots; otherwise goes through a bounce buffer


@dataclass
class Batch:
    submitted: float
    jobs: deque[Job]
    bytes_read: int
    reads: int
    workers: list[Future] = field(default_factory=list)
    failures: list[tuple] = field(default_factory=list)
    ended: float = 0.0


class PoolReader(Reader):
    native = False

    def __init__(self, threads: int, direct: bool, max_gap_bytes: int):
        super().__init__(direct)
        self._threads = threads
        self._max_gap = max_gap_bytes
        self._pool = ThreadPoolExecutor(threads, "mlx-flash-reader")
        self._buffers = threading.local()
        self._pid = os.getpid()
        self._flights: set[Future] = set()
        self._close_with(_leave, self._pool, self._flights)

    def close(self):
        if self._close.alive and self._pid == os.getpid():
            self._pool.shutdown(wait=True)
        super().close()

    def _register(self, source):
        rows = [memoryview(array.reshape(-1)) for array in source.slots]
        return source, rows, [_address(array) for array in source.slots]

    def _submit(self, registered, units, slots):
        self._check_process()
        submitted = time.perf_counter()
        _check_ids(registered[0], units, slots)
        jobs = plan(*registered, units, slots, self._max_gap)
        bytes_read = sum(job.end - job.start for job in jobs)
        batch = Batch(submitted, deque(jobs), bytes_read, len(jobs), ended=submitted)
        batch.workers = [
            self._pool.submit(_work, batch, self._buffers)
            for _ in range(min(self._threads, len(jobs)))
        ]
        for worker in batch.workers:
            self._flights.add(worker)
            worker.add_done_callback(self._flights.discard)
        return batch

    def _wait(self, batch):
        self._check_process()
        wait(batch.workers)
        for worker in batch.workers:
            worker.result()
        failure = batch.failures[0] if batch.failures else (0, 0, 0, 0, 0)
        seconds = batch.ended - batch.submitted
        return batch.bytes_read, batch.reads, seconds, *failure

    def _check_process(self):
        if self._pid != os.getpid():
            raise ValueError(
                "the reader was opened before a fork; "
                "open another one in the child process"
            )


def _leave(pool: ThreadPoolExecutor, flights: set[Future]) -> list[Future]:
    """End a reader, and return what is still reading if nobody closed it before.

    Garbage collection may run this in any thread, also in one that holds a lock which
    the pool's threads need to end: waiting for them here has been seen to hang.
    """
    pool.shutdown(wait=False)
    return [flight for flight in flights.copy() if not flight.done()]


def plan(
    source: Source,
    rows: list[memoryview],
    addresses: list[int],
    units: np.ndarray,
    slots: np.ndarray,
    max_gap: int,
) -> list[Job]:
    """Sort by unit, merge neighbours into one read, split what is large."""
    order = np.argsort(units, kind="stable")
    picks = list(zip(units[order].tolist(), slots[order].tolist(), strict=True))
    jobs: list[Job] = []
    for k, (extent, (fd, align)) in enumerate(
        zip(source.extents, source.files, strict=True)
    ):
        job = None  # reads of different extents are never merged
        for unit, slot in picks:
            gap = max_gap
            for index, part_offset, size in extent.parts:
                where = extent.offset + unit * extent.stride + part_offset
                for offset, at, n in _chunks(where, slot * size, size):
                    start = offset - offset % align
                    end = offset + n + -(offset + n) % align
                    address = addresses[index] + at
                    straight = align == 1 or not (offset | n | address) % PAGE_BYTES
                    piece = offset, n, rows[index][at : at + n]
                    if job:
                        last = job.pieces[-1]
                        skipped = offset - last[0] - last[1]
                        iovecs = job.iovecs + (2 if skipped > 0 else 1)
                    # skipped < 0: the same unit a second time, for another slot
                    if (
                        job
                        and skipped >= 0
                        and start - job.end <= gap
                        and end - job.start <= MERGE_BYTES
                        and iovecs <= MERGE_IOVECS
                    ):
                        job.pieces.append(piece)
                        job.end, job.iovecs = end, iovecs
                        job.straight &= straight
                    else:
                        job = Job(k, fd, align, start, end, [piece], 1, straight)
                        jobs.append(job)
                # Padding inside a unit costs less than a second read.
                gap = max(max_gap, PAGE_BYTES)
    return jobs


def _chunks(offset: int, at: int, size: int):
    while size > CHUNK_BYTES:  # cut where no page is read twice
        end = offset + CHUNK_BYTES
        cut = end - end % PAGE_BYTES - offset
        yield offset, at, cut
        offset, at, size = offset + cut, at + cut, size - cut
    yield offset, at, size


def _work(batch: Batch, local: threading.local) -> None:
    while True:
        try:
            job = batch.jobs.popleft()
        except IndexError:
            return
        if not hasattr(local, "buffer"):  # page-aligned, as direct I/O wants it
            size = CHUNK_BYTES + 2 * PAGE_BYTES
            local.buffer = memoryview(mmap.mmap(-1, size))
        got = [0]
        try:
            error = _read(job, local.buffer, got)
        except OSError as failed:
            error = failed.errno or errno.EIO
        if error:  # the batch is lost: leave the rest unread
            asked = job.end - job.start
            batch.failures.append((error, job.extent, job.start, asked, got[0]))
            batch.jobs.clear()
        batch.ended = time.perf_counter()


def _read(job: Job, buffer: memoryview, got: list[int]) -> int:
    """Return 0 or SHORT_READ; `got` is how far it came. Python retries EINTR."""
    offset, size, _ = job.pieces[-1]
    need = offset + size - job.start
    while got[0] < need:
        # Direct I/O that stopped inside a page goes on from the page's start; at the
        # end of the file it may stop there, as long as it has what is wanted.
        skip = got[0] - got[0] % job.align
        done = skip + os.preadv(job.fd, _views(job, buffer, skip), job.start + skip)
        if done <= got[0]:
            return SHORT_READ
        got[0] = done
    if not job.straight:
        for offset, size, destination in job.pieces:
            destination[:] = buffer[offset - job.start :][:size]
    return 0


def _views(job: Job, buffer: memoryview, skip: int) -> list[memoryview]:
    if not job.straight:
        return [buffer[skip : job.end - job.start]]
    at = job.start + skip  # what is before it has been read
    views = []
    for offset, size, destination in job.pieces:
        if offset + size <= at:
            continue
        if offset > at:  # a gap: all of them into the same scratch
            views.append(buffer[: offset - at])
            at = offset
        views.append(destination[at - offset :])
        at = offset + size
    return views


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
