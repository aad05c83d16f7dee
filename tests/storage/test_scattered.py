"""How files are opened and read: into several buffers by the rule of macOS, on Linux.

XNU ends a device read at every buffer that does not begin and end on a page of 16 KiB.
A read into several buffers then goes straight into the slots only where all of them do;
else it is one long read through a bounce buffer.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_flash.storage import direct_io, limits, native_reader

KIB = 1 << 10
HERE = Path(__file__).parent
SCRIPT = """
import mmap, sys
import numpy as np
from mlx_flash.storage import source
from mlx_flash.storage.reader import Extent, open_reader

path, native, page, size, gap, *units = sys.argv[1:]
source.SCATTER_BYTES, size, units = int(page), int(size), [int(u) for u in units]
memory = mmap.mmap(-1, 64 * size)  # on a page of 4 KiB at least
memory = np.frombuffer(memory, np.uint8)
skip = -source.address(memory) % 16384
slots = [memory[skip + i * 16 * size :][: 16 * size].reshape(16, size) for i in (0, 1)]
extent = Extent(path, 0, 2 * size, ((0, 0, size), (1, size, size)))
with open_reader(2, native=native == "C", max_gap_bytes=int(gap)) as reader:
    number = reader.add_source([extent], slots, 64)
    places = np.arange(len(units))
    reader.wait(reader.submit(number, np.array(units), places))
    if not reader.direct:
        sys.exit(3)
truth = np.fromfile(path, np.uint8).reshape(64, 2, size)[units]
for part, rows in enumerate(slots):
    assert (rows[places] == truth[:, part]).all()
print(source.address(slots[0]), source.address(slots[1]) + 16 * size)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")
READERS = pytest.mark.parametrize(
    "reader",
    [
        pytest.param(
            "C",
            marks=pytest.mark.skipif(
                native_reader._reader is None, reason="the C reader was not built here"
            ),
        ),
        "Python",
    ],
)


@pytest.fixture(scope="session")
def recorder(tmp_path_factory):
    """The library that notes where reads land."""
    library = tmp_path_factory.mktemp("recorder") / "recorded_reads.so"
    source = HERE / "recorded_reads.c"
    command = ["cc", "-O1", "-shared", "-fPIC", source, "-o", library]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no C compiler")
    return library


@pytest.fixture
def landed(recorder, tmp_path, reader):
    """landed(page, size of a part, units) → for each read, its buffers in the slots.

    A buffer is (address, bytes); one that is not in the slots is left out.
    """

    def run(page, size, units, gap=0):
        path, log = tmp_path / "bundles", tmp_path / "log"
        path.write_bytes(np.random.default_rng(1).bytes(64 * 2 * size))
        log.unlink(missing_ok=True)
        arguments = [path, reader, page, size, gap, *units]
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *map(str, arguments)],
            env=os.environ | {"LD_PRELOAD": str(recorder), "READS_LOG": str(log)},
            capture_output=True,
            text=True,
        )
        if done.returncode == 3:
            pytest.skip("no direct I/O on this file system")
        assert done.returncode == 0, done.stderr
        first, last = map(int, done.stdout.split())
        reads = []
        for line in log.read_text().splitlines():
            pairs = [tuple(map(int, word.split("+"))) for word in line.split()]
            reads.append([p for p in pairs if first <= p[0] < last])
        return reads[1:]  # the first tries whether direct I/O works

    return run


@READERS
def test_small_parts_are_scattered_where_the_page_is_small(landed):
    """On Linux two rows of 8 KiB are one read of two buffers, without a copy."""
    (read,) = landed(4 * KIB, 8 * KIB, [5])
    assert [size for _, size in read] == [8 * KIB, 8 * KIB]


@READERS
def test_small_parts_are_bounced_where_the_page_is_large(landed):
    """A bundle of OPT-6.7B: two rows of 8 KiB, which would become two device reads."""
    assert landed(16 * KIB, 8 * KIB, [5]) == [[]]
    assert not any(landed(16 * KIB, 8 * KIB, [5, 6, 7, 20]))


@READERS
def test_parts_of_whole_large_pages_are_scattered(landed):
    (read,) = landed(16 * KIB, 16 * KIB, [5])
    assert [size for _, size in read] == [16 * KIB, 16 * KIB]
    assert all(at % (16 * KIB) == 0 for at, _ in read)


@pytest.mark.skipif(native_reader._reader is None, reason="only the C reader merges")
@pytest.mark.parametrize("reader", ["C"])
def test_a_gap_of_a_small_page_is_not_scattered(landed):
    """Gaps land in scratch: they are buffers of the read as others are."""
    gap = 64 * KIB
    (read,) = landed(16 * KIB, 16 * KIB, [5, 7], gap)
    assert len(read) == 4  # between them lie 32 KiB, whole pages
    (read,) = landed(16 * KIB, 12 * KIB, [4, 6], gap)
    assert read == []


@READERS
def test_one_buffer_is_straight_on_a_small_page(landed):
    """Parts above 1 MiB are cut: each piece has one buffer, and no copy is needed."""
    size = 1024 * KIB + 8 * KIB
    reads = landed(16 * KIB, size, [3])
    assert sum(size for read in reads for _, size in read) == 2 * size
    assert all(len(read) == 1 for read in reads)


def test_the_large_page_is_the_rule_of_macos():
    expected = 16384 if sys.platform == "darwin" else 4096
    assert limits.SCATTER_BYTES == expected


def test_reads_through_the_page_cache_ask_for_nothing_more(tmp_path, monkeypatch):
    """What comes along would push out of the cache what is asked for again."""
    path, advised = tmp_path / "file", []
    path.write_bytes(bytes(4096))
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: advised.append(given))
    fd, direct = direct_io.open_uncached(path, False)
    os.close(fd)
    assert not direct and advised == [(fd, 0, 0, os.POSIX_FADV_RANDOM)]


def test_on_macos_too(tmp_path, monkeypatch):
    path, commands = tmp_path / "file", []
    path.write_bytes(bytes(4096))
    monkeypatch.setattr(direct_io, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(direct_io.fcntl, "fcntl", lambda *given: commands.append(given))
    for through, wanted in ((True, [(45, 0)]), (False, [(45, 0), (48, 1)])):
        fd, direct = direct_io.open_uncached(path, not through)
        os.close(fd)
        assert direct is not through
        assert sorted(given[1:] for given in commands) == wanted
        commands.clear()
