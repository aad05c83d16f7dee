"""Every byte that a reader brings is compared with what a plain `read` finds there."""

import errno
import gc
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.errors import FlashError
from mlx_flash.storage import direct_io, native_reader
from mlx_flash.storage import source as source_module
from mlx_flash.storage.reader import Extent, open_reader

CANARY = 0xA5
KIB, MIB = 1 << 10, 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's /proc")
NATIVE = pytest.param(
    True,
    id="C",
    marks=pytest.mark.skipif(
        native_reader._reader is None, reason="the C reader was not built here"
    ),
)
natives = pytest.mark.parametrize("native", [NATIVE, pytest.param(False, id="Python")])
# Only the C reader merges reads; Python reads unit by unit.
merging = pytest.mark.parametrize("native", [NATIVE])
directs = pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])


def random_file(path, size, seed=0):
    path.write_bytes(np.random.default_rng(seed).bytes(size))
    return path


def aligned_rows(n_slots, size):
    """Slots on a page boundary, as MLX's memory is cut, full of canaries."""
    memory = np.frombuffer(mmap.mmap(-1, n_slots * size), np.uint8)
    memory = memory.reshape(n_slots, size)
    memory[:] = CANARY
    return memory


def truth(extents, shapes, units, slots):
    """What the slots hold afterwards, read by seeking in the plain file."""
    arrays = [np.full(shape, CANARY, np.uint8) for shape in shapes]
    for extent in extents:
        with open(extent.path, "rb") as file:
            for unit, slot in zip(units, slots, strict=True):
                for index, offset, size in extent.parts:
                    file.seek(extent.offset + int(unit) * extent.stride + offset)
                    row = np.frombuffer(file.read(size), np.uint8)
                    arrays[index][slot] = row
    return arrays


def check(reader, extents, n_slots, n_units, units, slots):
    sizes = dict(sorted((i, n) for e in extents for i, _, n in e.parts)).values()
    arrays = [aligned_rows(n_slots, size) for size in sizes]
    source = reader.add_source(extents, arrays, n_units)
    units, slots = np.array(units, np.int64), np.array(slots, np.int64)
    result = reader.wait(reader.submit(source, units, slots))
    expected = truth(extents, [a.shape for a in arrays], units, slots)
    for array, wanted in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(array, wanted)
    assert result.seconds >= 0
    return result


@pytest.fixture
def neurons(tmp_path):
    """32 neurons of 2 x 8 KiB, and the slots for 16 of them."""
    path = random_file(tmp_path / "layer_03.safetensors", 32 * 16 * KIB)
    extent = Extent(path, 0, 16 * KIB, ((0, 0, 8 * KIB), (1, 8 * KIB, 8 * KIB)))
    return [extent], [aligned_rows(16, 8 * KIB) for _ in range(2)], 32


# ---- every byte ----

SIZES = [1, 7, 512, 1000, 4096, 5000, 8192]


@st.composite
def layouts(draw):
    """Extents in up to two files, with padding wherever there can be some."""
    n_units, extents, index = draw(st.integers(1, 20)), [], 0
    for _ in range(draw(st.integers(1, 3))):
        parts, end = [], draw(st.sampled_from([0, 0, 64]))
        for _ in range(draw(st.integers(1, 3))):
            size = draw(st.sampled_from(SIZES))
            parts.append((index, end, size))
            index += 1
            end += size + draw(st.sampled_from([0, 0, 3, 4096, 20000]))
        stride = end + draw(st.sampled_from([0, -end % 4096, 24]))
        offset = draw(st.sampled_from([0, 4096, 16384, 13]))
        name = draw(st.sampled_from(["a", "b"]))
        extents.append((name, offset, stride, draw(st.permutations(parts))))
    return n_units, draw(st.permutations(extents))


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    layout=layouts(),
    gap=st.sampled_from([0, 1, 4096, 50_000]),
    scatter=st.sampled_from([4 * KIB, 16 * KIB]),
)
def test_random_batches_are_read_alike_by_all_readers(data, layout, gap, scatter):
    n_units, extents = layout
    n_slots = data.draw(st.integers(1, 30))
    slots = data.draw(st.lists(st.integers(0, n_slots - 1), unique=True))
    ids = st.integers(0, n_units - 1)
    units = data.draw(st.lists(ids, min_size=len(slots), max_size=len(slots)))
    with tempfile.TemporaryDirectory() as folder:
        ends = [o + (n_units - 1) * s + max(a + n for _, a, n in p)
                for _, o, s, p in extents]  # fmt: skip
        for seed, name in enumerate("ab"):  # not one byte more than is needed
            need = max((e for e, x in zip(ends, extents, strict=True) if x[0] == name),
                       default=0)  # fmt: skip
            random_file(Path(folder, name), need, seed)
        extents = [Extent(f"{folder}/{n}", o, s, tuple(p)) for n, o, s, p in extents]
        for direct in (True, False):
            for native in {native_reader._reader is not None, False}:
                options = dict(native=native, direct=direct, max_gap_bytes=gap)
                with (
                    mock.patch.object(source_module, "SCATTER_BYTES", scatter),
                    open_reader(3, **options) as reader,
                ):
                    check(reader, extents, n_slots, n_units, units, slots)


@natives
@directs
@pytest.mark.parametrize(
    "parts", [(512, 512), (8192, 8192), (1000,), (600_000, 40_000), (2**21 + 4096 + 5,),
              (2**20 + 1, 3 * 2**20 - 1), (3 * 2**20,)], ids=str)  # fmt: skip
def test_unit_sizes(tmp_path, native, direct, parts):
    starts = np.cumsum((0, *parts)).tolist()
    *starts, stride = starts
    n_units = 200 if stride < 10_000 else 6
    path = random_file(tmp_path / "f", n_units * stride)
    triples = zip(range(len(parts)), starts, parts, strict=True)
    extents = [Extent(path, 0, stride, tuple(triples))]
    rng = np.random.default_rng(1)
    n = n_units // 2
    units, slots = rng.permutation(n_units)[:n], rng.permutation(n_units)[:n]
    with open_reader(8, native=native, direct=direct) as reader:
        check(reader, extents, n_units, n_units, units, slots)


@natives
@directs
def test_reads_land_in_mlx_arrays(neurons, native, direct):
    extents, _, n_units = neurons
    arrays = [mx.zeros((16, 8 * KIB), mx.uint8) for _ in range(2)]
    mx.eval(arrays)
    views = [np.array(a, copy=False) for a in arrays]
    with open_reader(4, native=native, direct=direct) as reader:
        source = reader.add_source(extents, views, n_units)
        reader.wait(reader.submit(source, np.array([31]), np.array([5])))
    wanted = truth(extents, [v.shape for v in views], [31], [5])
    for array, want in zip(arrays, wanted, strict=True):
        assert mx.array_equal(array[5], mx.array(want[5]))


@natives
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_ids_of_any_integer_type_and_step(neurons, native, dtype):
    extents, arrays, n_units = neurons
    units, slots = np.array([9, 0, 3, 0, 30, 0], dtype), np.arange(12, dtype=dtype)
    with open_reader(4, native=native) as reader:
        source = reader.add_source(extents, arrays, n_units)
        reader.wait(reader.submit(source, units[::2], slots[1:12:4]))
    wanted = truth(extents, [a.shape for a in arrays], [9, 3, 30], [1, 5, 9])
    np.testing.assert_array_equal(arrays, wanted)


# ---- how many reads ----


@pytest.fixture
def counted(tmp_path, native, direct):
    def count(stride, parts, units, n_units=2000, offset=0, n_slots=0, **options):
        extent = Extent(tmp_path / "f", offset, stride, parts)
        random_file(extent.path, offset + n_units * stride)
        n, n_slots = len(units), n_slots or len(units)
        with open_reader(2, native=native, direct=direct, **options) as reader:
            result = check(reader, [extent], n_slots, n_units, units, range(n))
            if direct and not reader.direct:
                pytest.skip("no direct I/O on this file system")
        return result.reads, result.bytes_read

    return count


@merging
@directs
def test_adjacent_units_are_one_read(counted):
    pair = (0, 0, 8 * KIB), (1, 8 * KIB, 8 * KIB)
    assert counted(16 * KIB, pair, [6, 4, 5, 7], 32) == (1, 64 * KIB)
    assert counted(16 * KIB, pair, [1, 3, 5], 32) == (3, 48 * KIB)
    assert counted(16 * KIB, pair, range(32), 32) == (2, 512 * KIB)  # 256 KiB each
    assert counted(16 * KIB, pair, [1, 1], 32) == (2, 32 * KIB)  # one unit, two slots
    assert counted(16 * KIB, pair, [], 32, n_slots=1) == (0, 0)


@merging
@directs
def test_iovecs_bound_a_read(counted, direct):
    reads, bytes_read = counted(100, ((0, 0, 100),), range(1000), 1000)
    assert reads == 2
    # Page 12 is needed by both of them: bytes 51,200 lies in its middle.
    assert bytes_read == (26 * 4096 if direct else 100_000)


@merging
@directs
def test_small_units_share_pages_only_in_direct_mode(counted, direct):
    halves = (0, 0, 512), (1, 512, 512)
    wanted = (2, 2 * 4096 + 4096) if direct else (3, 5 * KIB)
    assert counted(1 * KIB, halves, [0, 2, 3, 4, 16]) == wanted


@merging
@directs
def test_gaps_are_read_over_when_they_are_small_enough(counted, direct):
    part = ((0, 0, 16 * KIB),)
    units = [0, 2, 5]  # gaps of one and of two units
    assert counted(16 * KIB, part, units, 8) == (3, 48 * KIB)
    assert counted(16 * KIB, part, units, 8, max_gap_bytes=16 * KIB) == (2, 64 * KIB)
    assert counted(16 * KIB, part, units, 8, max_gap_bytes=32 * KIB) == (1, 96 * KIB)


@merging
@directs
def test_padding_inside_a_unit_does_not_split_it(counted, direct):
    parts = (0, 0, 8192), (1, 8200, 4000), (2, 40_960, 4096)
    assert counted(45_056, parts, [3], 8) == (
        (2, 12_288 + 4096) if direct else (2, 12_200 + 4096)
    )


@merging
@directs
def test_large_units_are_split(counted, direct):
    assert counted(3 * MIB, ((0, 0, 3 * MIB),), [1], 2) == (3, 3 * MIB)
    odd = 2 * MIB + 5000  # from byte 100: cut at pages, so that none is read twice
    wanted = 2 * MIB + 8192 if direct else odd
    assert counted(odd, ((0, 0, odd),), [0], 1, offset=100) == (3, wanted)


# ---- what nobody waits for ----


@natives
def test_drain_waits_for_what_nobody_has_a_ticket_of(tmp_path, native):
    """Afterwards nothing writes to the slots any more, whatever was in flight."""
    path = random_file(tmp_path / "f", 2000 * KIB)
    array = aligned_rows(1000, 2 * KIB)
    with open_reader(4, native=native, direct=False) as reader:
        extent = Extent(path, 0, 2 * KIB, ((0, 0, 2 * KIB),))
        source = reader.add_source([extent], [array], 1000)
        for _ in range(20):
            reader.submit(source, np.arange(1000), np.arange(1000))
            reader.drain()
            array[:] = 0
            time.sleep(0.002)
            assert not array.any()
        reader.drain()  # also where nothing is in flight
        ticket = reader.submit(source, np.arange(1000), np.arange(1000))
        reader.wait(ticket)
        assert array.tobytes() == path.read_bytes()
    with pytest.raises(ValueError, match="closed"):
        reader.drain()


# ---- what is refused ----


@natives
def test_files_are_checked_first(neurons, native, tmp_path):
    (extent,), arrays, n_units = neurons
    with open_reader(2, native=native) as reader:
        with pytest.raises(FlashError, match=r"_03.safetensors has 524,288 of 540,672"):
            reader.add_source([extent], arrays, n_units + 1)
        missing = Extent(tmp_path / "none", 0, 16 * KIB, extent.parts)
        with pytest.raises(FlashError, match="none cannot be read: No such file"):
            reader.add_source([missing], arrays, n_units)
        folder = Extent(tmp_path, 0, 16 * KIB, extent.parts)
        with pytest.raises(FlashError, match="cannot be read|has .* bytes"):
            reader.add_source([folder], arrays, n_units)
        assert reader.add_source([extent], arrays, n_units) == 0


def frozen(array):
    array.flags.writeable = False
    return array


@natives
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.astype(np.int8), "uint8"),
        (lambda a: a.tolist(), "uint8"),
        (lambda a: a.reshape(-1), "2-D"),
        (lambda a: a[:0], "2-D"),
        (lambda a: a[:, ::2], "C-contiguous"),
        (lambda a: np.asfortranarray(a), "C-contiguous"),
        (lambda a: frozen(a.copy()), "writable"),
        (lambda a: a[:15], "15 rows, not 16"),
        (lambda a: a.reshape(32, -1), "32 rows, not 16"),
        (lambda a: np.zeros((16, 8 * KIB - 1), np.uint8), "slots of 8191"),
        (lambda a: np.zeros((16, 8 * KIB + 1), np.uint8), "slots of 8193"),
    ],
)
def test_wrong_arrays(neurons, native, change, message):
    extents, (up, down), n_units = neurons
    with open_reader(2, native=native) as reader:
        with pytest.raises(ValueError, match=message):
            reader.add_source(extents, [up, change(down)], n_units)


@natives
@pytest.mark.parametrize(
    "parts, offset, n_units",
    [
        (((0, 0, 8192), (1, 8193, 8192)), 0, 2),  # out of the stride
        (((0, 0, 8192), (1, 8191, 8192)), 0, 2),  # overlap
        (((0, -1, 8192), (1, 8192, 8192)), 0, 2),
        (((0, 0, 8192), (0, 8192, 8192)), 0, 2),  # slots 0 twice
        (((0, 0, 8192),), 0, 2),  # slots 1 never
        (((0, 0, 8192), (2, 8192, 8192)), 0, 2),
        (((0, 0, 8192), (-1, 8192, 8192)), 0, 2),
        ((), 0, 2),
        (((0, 0, 8192), (1, 8192, 8192)), -1, 2),
        (((0, 0, 8192), (1, 8192, 8192)), 0, 0),
    ],
)
def test_wrong_extents(neurons, native, parts, offset, n_units):
    (extent,), arrays, _ = neurons
    with open_reader(2, native=native) as reader:
        with pytest.raises(ValueError):
            wrong = Extent(extent.path, offset, 16 * KIB, parts)
            reader.add_source([wrong], arrays, n_units)


@natives
@pytest.mark.parametrize(
    "units, slots, message",
    [
        ([32], [0], r"unit 32 is not in \[0, 32\)"),
        ([-1], [0], "unit -1"),
        ([2**62], [0], "unit 4611686018427387904"),
        ([0], [16], r"slot 16 is not in \[0, 16\)"),
        ([0], [-1], "slot -1"),
        ([0, 1, 2], [3, 4, 3], "slot 3 is twice"),
        ([0, 1], [0], "2 units for 1 slots"),
        ([0] * 17, list(range(16)) + [0], "slots|twice"),
        ([0.0], [0], "float64"),
        ([[0]], [[0]], "integers"),
    ],
)
def test_wrong_ids_touch_nothing(neurons, native, units, slots, message):
    extents, arrays, n_units = neurons
    with open_reader(2, native=native) as reader:
        source = reader.add_source(extents, arrays, n_units)
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                reader.submit(source, np.array(units), np.array(slots))
        for wrong in (source + 1, -1):
            with pytest.raises(ValueError, match="source"):
                reader.submit(wrong, np.array([0]), np.array([0]))
    assert all((array == CANARY).all() for array in arrays)


@natives
def test_options(native, monkeypatch):
    for options in ({"threads": 0}, {"threads": 2000}, {"max_gap_bytes": -1}):
        with pytest.raises(ValueError):
            open_reader(**options, native=native)
    with open_reader(1, native=native) as reader:
        assert reader.native is native
    monkeypatch.setattr(native_reader, "_reader", None)
    with pytest.raises(FlashError, match="not built"):
        open_reader(native=True)
    with open_reader(1) as reader:
        assert not reader.native


# ---- what fails while it reads ----


def read_all(reader, neurons):
    extents, arrays, n_units = neurons
    source = reader.add_source(extents, arrays, n_units)
    return reader, reader.submit(source, np.arange(0, 32, 2), np.arange(16))


@natives
@directs
def test_file_cut_after_it_was_opened(neurons, native, direct):
    path = neurons[0][0].path
    with open_reader(4, native=native, direct=direct) as reader:
        source = reader.add_source(*neurons)
        os.truncate(path, 20 * 16 * KIB + 100)
        units = np.array([1, 20])
        ticket = reader.submit(source, units, units % 16)
        message = (
            rf"{path}: read of 16384 bytes at offset 327680 failed: only 100 bytes .* "
            "mlx-flash verify"
        )
        for _ in range(2):  # waiting again says the same
            with pytest.raises(FlashError, match=message):
                reader.wait(ticket)
        good = reader.submit(source, np.array([2]), np.array([3]))
        assert reader.wait(good).reads == 1


@linux
@natives
@directs
@pytest.mark.parametrize(
    "stand_in, code", [("/proc/self/mem", errno.EIO), ("/", errno.EISDIR)]
)
def test_failing_disk(neurons, native, direct, stand_in, code):
    extents, arrays, n_units = neurons
    with open_reader(4, native=native, direct=direct) as reader:
        source = reader.add_source(extents, arrays, n_units)
        other = os.open(stand_in, os.O_RDONLY)
        os.dup2(other, next(iter(reader._files._open.values())).descriptor)
        os.close(other)
        ticket = reader.submit(source, np.array([3]), np.array([0]))
        reason = os.strerror(code)
        with pytest.raises(FlashError) as failure:
            reader.wait(ticket)
        assert "layer_03.safetensors: read of 16384 bytes at offset 49152 " in str(
            failure.value
        )
        assert f"failed: {reason}; the disk or the file" in str(failure.value)


@natives
def test_nothing_is_written_after_a_failure_was_raised(tmp_path, native):
    path = random_file(tmp_path / "f", 3000 * KIB)
    array = aligned_rows(1500, KIB)
    with open_reader(16, native=native, direct=False) as reader:
        source = reader.add_source(
            [Extent(path, 0, 2 * KIB, ((0, 0, KIB),))], [array], 1500
        )
        os.truncate(path, 100 * KIB)
        with pytest.raises(FlashError):
            reader.wait(reader.submit(source, np.arange(1500), np.arange(1500)))
        before = array.copy()
        time.sleep(0.02)
        np.testing.assert_array_equal(array, before)


@linux
def test_a_read_that_came_short_spoils_nothing(tmp_path, monkeypatch):
    """A second read of the last page may come short, too, and leave anything behind."""
    path = random_file(tmp_path / "f", 8192)
    real, lengths = os.preadv, iter([5000, 10])

    def preadv(fd, buffers, offset):
        real(fd, buffers, offset)
        length = next(lengths)
        buffers[0][length:] = bytes(len(buffers[0]) - length)
        return length

    with open_reader(1, native=False) as reader:
        array = aligned_rows(1, 4500)
        source = reader.add_source([Extent(path, 0, 4500, ((0, 0, 4500),))], [array], 1)
        if not reader.direct:
            pytest.skip("no direct I/O on this file system")
        monkeypatch.setattr(os, "preadv", preadv)
        reader.wait(reader.submit(source, np.array([0]), np.array([0])))
    assert array.tobytes() == path.read_bytes()[:4500]


SHIM = """
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
static atomic_int calls;
ssize_t preadv64(int fd, const struct iovec *iov, int n, off_t offset)
{
    int call = ++calls, together = atoi(getenv("TOGETHER") ?: "0");
    if (together)
        while (calls < (call + together - 1) / together * together)
            usleep(100);
    else if (call % 3 == 0) {
        errno = EINTR;
        return -1;
    }
    ssize_t got = syscall(SYS_preadv, fd, iov, n, offset, 0);
    return got > 5000 ? 5000 : got; /* more than a page, and not aligned */
}
ssize_t preadv(int fd, const struct iovec *iov, int n, off_t offset)
{
    return preadv64(fd, iov, n, offset);
}
ssize_t preadv64v2(int fd, const struct iovec *iov, int n, off_t offset, int flags)
{
    return preadv64(fd, iov, n, offset);
}
"""


@pytest.fixture
def shimmed(tmp_path):
    """Run a script on this file's helpers, with the preadv above in front."""
    if not (compiler := shutil.which("cc")):
        pytest.skip("needs a C compiler, to put a stubborn preadv in front")
    shim = tmp_path / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", shim]
    subprocess.run(command, input=SHIM, text=True, check=True)

    def run(script, **environment):
        head = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        head += "from test_reader import *\n"
        environment = {**os.environ, **environment, "LD_PRELOAD": str(shim)}
        run_script(head + script, env=environment)

    return run


@linux
@natives
@directs
def test_interrupted_and_partial_reads_go_on(native, direct, tmp_path, shimmed):
    shimmed(f"""
with open_reader(3, native={native}, direct={direct}, max_gap_bytes=4096) as reader:
    for parts in [(8192, 8192), (9000, 4000, 5000), (300_001,)]:
        ends = np.cumsum((0, *parts)).tolist()
        stride = ends[-1] + 700
        path = random_file(Path({str(tmp_path)!r}) / str(stride), 9 * stride)
        parts = tuple(zip(range(9), ends, parts))
        check(reader, [Extent(path, 5, stride, parts)], 9, 8, [1, 2, 7], [0, 4, 8])
        check(reader, [Extent(path, 0, stride, parts)], 9, 9, [0, 8], [7, 2])
""")


@linux
@natives
def test_all_threads_read_at_once(native, tmp_path, shimmed):
    shimmed(
        f"""
path = random_file(Path({str(tmp_path)!r}) / "f", 256 * 8192)
extents = [Extent(path, 0, 8192, ((0, 0, 4096),))]
with open_reader(16, native={native}, direct=False) as reader:
    result = check(reader, extents, 128, 256, range(0, 256, 2), range(128))
assert result.reads == 128
""",
        TOGETHER="16",  # a read ends when so many have begun: fewer would hang
    )


def run_script(script, **options):
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(
        command, timeout=60, capture_output=True, text=True, **options
    )
    assert done.returncode == 0 and not done.stderr, done.stderr


# ---- many at once, and the end ----


@natives
@directs
def test_many_threads_with_many_batches_in_flight(tmp_path, native, direct):
    n_units, stride = 64, 5000
    path = random_file(tmp_path / "f", n_units * stride)
    extents = [Extent(path, 0, stride, ((0, 0, 1000), (1, 1000, 4000)))]
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        shapes = [(n_units, 1000), (n_units, 4000)]
        try:
            flights = []
            for _ in range(10):
                arrays = [np.full(shape, CANARY, np.uint8) for shape in shapes]
                source = reader.add_source(extents, arrays, n_units)
                n = int(rng.integers(0, n_units))
                ids = rng.permutation(n_units)[:n], rng.permutation(n_units)[:n]
                flights.append((arrays, ids, reader.submit(source, *ids)))
            for i in rng.permutation(len(flights)):
                arrays, ids, ticket = flights[i]
                reader.wait(ticket)
                for have, want in zip(
                    arrays, truth(extents, shapes, *ids), strict=True
                ):
                    np.testing.assert_array_equal(have, want)
        except BaseException as failure:
            failures.append(failure)

    with open_reader(16, native=native, direct=direct) as reader:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]


@natives
def test_close_ends_what_is_in_flight(neurons, native):
    reader, ticket = read_all(open_reader(1, native=native), neurons)
    large = neurons[0][0].path.with_name("large")
    with open(large, "wb") as file:
        file.truncate(64 * MIB)
    array = aligned_rows(4, 16 * MIB)
    extent = Extent(large, 0, 16 * MIB, ((0, 0, 16 * MIB),))
    source = reader.add_source([extent], [array], 4)
    last = reader.submit(source, np.arange(4), np.arange(4))
    reader.close()
    assert not array.any()

    reader.close()
    for late in (ticket, last):
        with pytest.raises(ValueError, match="the reader is closed"):
            reader.wait(late)
    with pytest.raises(ValueError, match="the reader is closed"):
        reader.submit(0, np.arange(2), np.arange(2))
    with pytest.raises(ValueError, match="the reader is closed"):
        reader.add_source(*neurons)


@natives
def test_tickets_may_be_dropped_or_waited_for_twice(neurons, native):
    reader, ticket = read_all(open_reader(4, native=native), neurons)
    with reader:
        assert reader.wait(ticket) == reader.wait(ticket)
        for _ in range(50):
            reader.submit(0, np.arange(15), np.arange(15))  # nobody waits
        del ticket
        last = reader.submit(0, np.array([7]), np.array([15]))
        assert reader.wait(last).bytes_read == 16 * KIB
    ids = [*range(15), 7], range(16)
    wanted = truth(neurons[0], [a.shape for a in neurons[1]], *ids)
    np.testing.assert_array_equal(neurons[1], wanted)


@linux
@natives
@pytest.mark.parametrize("how", ["close", "drop"])
def test_nothing_leaks(neurons, native, how):
    def held():
        return [len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task")]

    def wait_until(done):
        """What a thread holds goes with it: a moment after the reader."""
        deadline = time.monotonic() + 5
        while not done() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert done()

    before = held()
    for _ in range(20):
        wait_until(lambda: held()[0] == before[0])
        reader, ticket = read_all(open_reader(8, native=native), neurons)
        assert held()[0] == before[0] + 1
        reader.add_source(*neurons)  # the same file once more
        assert held()[0] == before[0] + 1
        if how == "close":
            reader.close()
        del reader, ticket
    gc.collect()
    wait_until(lambda: held() == before)


@linux
@natives
def test_dropped_tickets_free_their_plan(tmp_path, native):
    path = random_file(tmp_path / "f", 4000 * 64)
    array = np.zeros((4000, 64), np.uint8)
    ids = np.arange(4000)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    with open_reader(1, native=native, direct=False) as reader:
        extent = Extent(path, 0, 64, ((0, 0, 64),))
        source = reader.add_source([extent], [array], 4000)
        before = resident()
        for _ in range(200 if native else 10):  # 0.4 MB each
            for _ in range(3):
                reader.submit(source, ids, ids)
            reader.wait(reader.submit(source, ids, ids))
        assert resident() - before < 40e6


@natives
@pytest.mark.parametrize("child", [False, True], ids=["exit", "fork"])
def test_process_may_end_without_close(neurons, native, child):
    path = neurons[0][0].path
    run_script(f"""
import os, sys, warnings
import numpy as np
from mlx_flash.storage.reader import Extent, open_reader
parts = (0, 0, 8192), (1, 8192, 8192)
arrays = [np.zeros((32, 8192), np.uint8) for _ in range(2)]
reader = open_reader(8, native={native})
source = reader.add_source([Extent({str(path)!r}, 0, 16384, parts)], arrays, 32)
tickets = [reader.submit(source, np.arange(32), np.arange(32)) for _ in range(20)]
if {child}:
    warnings.simplefilter("ignore")  # of Python 3.12, about forks and threads
    if pid := os.fork():
        sys.exit(os.waitpid(pid, 0)[1])
    for call in (lambda: reader.wait(tickets[0]),
                 lambda: reader.submit(source, np.arange(3), np.arange(3))):
        try:
            call()
        except ValueError as error:
            assert "fork" in str(error)
        else:
            sys.exit("a forked child cannot read")
""")


# ---- direct I/O, and where there is none ----


@linux
def test_direct_is_told(neurons):
    extents, arrays, n_units = neurons
    fd, direct = direct_io.open_uncached(extents[0].path, True)
    flags = os.O_DIRECT if direct else 0
    with open(f"/proc/self/fdinfo/{fd}") as info:
        assert int(info.read().split()[3], 8) & os.O_DIRECT == flags
    os.close(fd)
    for asked in (True, False):
        with open_reader(1, direct=asked) as reader:
            reader.add_source(extents, arrays, n_units)
            assert reader.direct is (asked and direct)


@linux
@natives
@pytest.mark.parametrize("refuses", ["open", "read", "tmpfs"])
def test_file_systems_without_direct_io_are_read_buffered(
    neurons, native, refuses, monkeypatch
):
    (extent,), arrays, n_units = neurons
    real_open, open_before = os.open, len(os.listdir("/proc/self/fd"))

    def no_open(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest)

    def no_read(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    with open_reader(2, native=native) as reader:
        if refuses == "tmpfs":
            if not os.access("/dev/shm", os.W_OK):
                pytest.skip("no /dev/shm")
            with tempfile.NamedTemporaryFile(dir="/dev/shm") as copy:
                copy.write(Path(extent.path).read_bytes())
                copy.flush()
                extent = Extent(copy.name, 0, extent.stride, extent.parts)
                check(reader, [extent], 9, 32, [1, 5, 6], [8, 0, 1])
            return
        with monkeypatch.context() as patch:
            name, fake = {"open": ("open", no_open), "read": ("preadv", no_read)}[
                refuses
            ]
            patch.setattr(os, name, fake)
            source = reader.add_source([extent], arrays, n_units)
        assert not reader.direct
        result = reader.wait(reader.submit(source, np.array([3]), np.array([4])))
        assert (result.reads, result.bytes_read) == (1, 16 * KIB)
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_macos_turns_cache_and_readahead_off(neurons, monkeypatch):
    calls = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(direct_io.fcntl, "fcntl", lambda *call: calls.append(call))
    fd, direct = direct_io.open_uncached(neurons[0][0].path, True)
    os.close(fd)
    assert direct and calls == [(fd, 48, 1), (fd, 45, 0)]


@natives
def test_guessed_reads_give_way(native, tmp_path):
    """What is needed has come while some of an older guess has not.

    The guess has no end in sight for one thread; now and then it may have, where this
    test's own thread has to wait for long, so some attempts are allowed.
    """
    many, size = 20_000, 512
    path = random_file(tmp_path / "units", 2 * many * size)
    extents = [Extent(path, 0, 2 * size, ((0, 0, size),))]
    with open_reader(1, direct=False, native=native, max_gap_bytes=0) as reader:
        slots = aligned_rows(many, size)
        needed = aligned_rows(1, size)
        guess = reader.add_source(extents, [slots], many)
        source = reader.add_source(extents, [needed], many)
        one, all_ids = np.zeros(1, np.int64), np.arange(many)
        overtaken = False
        for _ in range(10):
            slots[:] = CANARY
            early = reader.submit(guess, all_ids, all_ids, guess=True)
            reader.wait(reader.submit(source, one + many - 1, one))
            overtaken |= bool((slots[-1] == CANARY).all())
            reader.wait(early)
            whole = np.frombuffer(path.read_bytes(), np.uint8).reshape(many, 2, size)
            np.testing.assert_array_equal(slots, whole[:, 0])
            np.testing.assert_array_equal(needed[0], whole[-1, 0])
        assert overtaken
