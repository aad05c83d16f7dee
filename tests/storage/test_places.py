"""Parts of units that lie anywhere in several files, read by both readers."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.errors import FlashError
from mlx_flash.storage import native_reader
from mlx_flash.storage.extents import ABSENT
from mlx_flash.storage.limits import CHUNK_BYTES
from mlx_flash.storage.reader import Extent, Places, open_reader

NATIVE = sorted({native_reader._reader is not None, False})
SIZES = [1, 7, 512, 1000, 4096, 5000, 8192]
merging = pytest.mark.parametrize("native", NATIVE)


def content(size, seed):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def places(path, sizes, offsets, first=0):
    parts = tuple((first + i, 0, size) for i, size in enumerate(sizes))
    return Places(Path(path), parts, np.array(offsets, np.int64))


def check(reader, extents, files, sizes, n_units, units, slots, stored=None):
    """Read, and compare every byte of every slot with what NumPy cuts out of files."""
    n_slots = max(slots, default=0) + 1
    arrays = [np.full((n_slots, size), 9, np.uint8) for size in sizes]
    expected = [array.copy() for array in arrays]
    for unit, slot in zip(units, slots, strict=True):
        there = unit if stored is None else stored[unit]
        for extent in extents:
            data = files[extent.path.name]
            for column, (index, offset, size) in enumerate(extent.parts):
                if isinstance(extent, Places):
                    at = int(extent.offsets[there, column])
                else:
                    at = extent.offset + there * extent.stride + offset
                if at != ABSENT:
                    expected[index][slot] = data[at : at + size]
    source = reader.add_source(extents, arrays, n_units, stored)
    ticket = reader.submit(source, np.array(units, int), np.array(slots, int))
    result = reader.wait(ticket)
    for array, wanted in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(array, wanted)
    return result


@st.composite
def layouts(draw):
    """Sizes of parts, and of every part of every unit its file and offset.

    Parts lie one behind the other in any order, with gaps or without; some units share
    their bytes with another one.
    """
    n_units = draw(st.integers(1, 9))
    sizes = draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=4))
    spots = [(unit, part) for unit in range(n_units) for part in range(len(sizes))]
    ends, where = {"a": draw(st.sampled_from([0, 13, 4096])), "b": 0}, {}
    for spot in draw(st.permutations(spots)):
        name = draw(st.sampled_from(["a", "a", "b"]))
        at = ends[name] + draw(st.sampled_from([0, 0, 0, 1, 4096, 20000]))
        where[spot] = (name, at)
        ends[name] = at + sizes[spot[1]]
    if n_units > 1 and draw(st.booleans()):
        where[0, 0] = where[1, 0]
    return n_units, sizes, where, ends


@settings(max_examples=150, deadline=None)
@given(data=st.data(), layout=layouts(), gap=st.sampled_from([0, 1, 4096, 50_000]))
def test_random_places_are_read_alike_by_all_readers(data, layout, gap):
    n_units, sizes, where, ends = layout
    shared = data.draw(st.booleans())
    some = st.lists(st.integers(0, n_units - 1), min_size=1, unique=True)
    stored = np.array(sorted(data.draw(some))) if shared else None
    readable = len(stored) if shared else n_units
    slots = data.draw(st.lists(st.integers(0, 12), unique=True))
    ids = st.integers(0, readable - 1)
    units = data.draw(st.lists(ids, min_size=len(slots), max_size=len(slots)))
    with tempfile.TemporaryDirectory() as folder:
        files = {name: content(end, end) for name, end in ends.items()}
        extents = []
        for name, bytes_ in files.items():
            (Path(folder) / name).write_bytes(bytes_.tobytes())
            table = np.full((n_units, len(sizes)), ABSENT)
            for spot, (file, at) in where.items():
                if file == name:
                    table[spot] = at
            if (table != ABSENT).any():
                extents.append(places(Path(folder, name), sizes, table))
        for direct in (True, False):
            for native in NATIVE:
                options = dict(native=native, direct=direct, max_gap_bytes=gap)
                with open_reader(3, **options) as reader:
                    check(reader, extents, files, sizes, readable, units, slots, stored)


@merging
@pytest.mark.parametrize("direct", [True, False])
def test_parts_longer_than_one_read(tmp_path, native, direct):
    sizes = [CHUNK_BYTES + 5, 3 * CHUNK_BYTES, 4096]
    table = [[0, CHUNK_BYTES + 5, 4 * CHUNK_BYTES + 5], [0, 0, 0]]
    table[1] = [8 * CHUNK_BYTES + 3, 11 * CHUNK_BYTES, 10 * CHUNK_BYTES]
    files = {"f": content(14 * CHUNK_BYTES, 1)}
    path = tmp_path / "f"
    path.write_bytes(files["f"].tobytes())
    with open_reader(4, native=native, direct=direct) as reader:
        extents = [places(path, sizes, table)]
        check(reader, extents, files, sizes, 2, [1, 0], [0, 2])


@merging
def test_neighbours_are_one_read_whatever_unit_they_belong_to(tmp_path, native):
    # As a shard has them that was sorted by name: down, gate and up of each expert.
    sizes, n_units = [1000, 1000, 500], 12
    order = sorted(range(n_units), key=str)  # 0, 1, 10, 11, 2, …
    table = np.zeros((n_units, 3), int)
    for rank, unit in enumerate(order):
        table[unit] = 2500 * rank + np.array([500, 1500, 0])
    files = {"f": content(2500 * n_units, 2)}
    (tmp_path / "f").write_bytes(files["f"].tobytes())
    extents = [places(tmp_path / "f", sizes, table)]
    with open_reader(2, native=native, direct=False) as reader:

        def reads(*units):
            slots = list(range(len(units)))
            found = check(reader, extents, files, sizes, n_units, units, slots)
            assert found.bytes_read == 2500 * len(units)
            return found.reads

        assert reads(5) == 1
        assert reads(1, 10, 11) == 1
        assert reads(1, 2) == 2


@merging
def test_a_stride_for_one_part_and_places_for_another(tmp_path, native):
    files = {"a": content(3000, 3), "b": content(2000, 4)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data.tobytes())
    extents = [
        Extent(tmp_path / "a", 100, 700, ((1, 10, 600),)),
        places(tmp_path / "b", [64], [[900], [0], [64], [1500]]),
    ]
    with open_reader(2, native=native) as reader:
        check(reader, extents, files, [64, 600], 4, [3, 0, 2], [1, 0, 3])


@merging
def test_a_file_that_ends_too_early(tmp_path, native):
    path = tmp_path / "shard"
    path.write_bytes(bytes(1000))
    arrays = [np.zeros((1, 100), np.uint8)]
    with open_reader(2, native=native) as reader:
        with pytest.raises(FlashError, match=r"shard has 1,000 of 1,001 bytes"):
            reader.add_source([places(path, [100], [[0], [901]])], arrays, 2)
        # What is read of it is there: the unit that is not has another machine.
        reader.add_source([places(path, [100], [[900], [901]])], arrays, 1)


@merging
def test_a_file_that_is_cut_under_a_reader(tmp_path, native):
    path = tmp_path / "shard"
    path.write_bytes(bytes(100_000))
    arrays = [np.zeros((2, 50_000), np.uint8)]
    with open_reader(2, native=native) as reader:
        extents = [places(path, [50_000], [[0], [50_000]])]
        source = reader.add_source(extents, arrays, 2)
        path.write_bytes(bytes(60_000))
        ticket = reader.submit(source, np.array([1]), np.array([0]))
        with pytest.raises(FlashError, match=r"shard: read of .* cut short"):
            reader.wait(ticket)


@merging
@pytest.mark.parametrize(
    "sizes, table",
    [
        ([8], [[ABSENT], [8]]),  # unit 0 nowhere
        ([8], [[0]]),  # a table of one unit
        ([8], [[-2], [8]]),
        ([8], [0, 8]),
        ([8], [[0, 1], [2, 3]]),
        ([9], [[0], [9]]),  # another size than the slots
        ([], [[], []]),
    ],
)
def test_tables_that_contradict(tmp_path, native, sizes, table):
    (tmp_path / "f").write_bytes(bytes(100))
    arrays = [np.zeros((2, 8), np.uint8)]
    with open_reader(1, native=native) as reader, pytest.raises(ValueError):
        reader.add_source([places(tmp_path / "f", sizes, table)], arrays, 2)


@merging
def test_a_part_in_two_files(tmp_path, native):
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(100))
    extents = [places(tmp_path / name, [8], [[0], [8]]) for name in "ab"]
    with (
        open_reader(1, native=native) as reader,
        pytest.raises(ValueError, match="2 times"),
    ):
        reader.add_source(extents, [np.zeros((2, 8), np.uint8)], 2)


@merging
def test_slots_that_move(tmp_path, native):
    data = content(800, 5)
    (tmp_path / "f").write_bytes(data.tobytes())
    table = [[700], [0], [350]]
    with open_reader(2, native=native) as reader:
        extents = [places(tmp_path / "f", [100], table)]
        source = reader.add_source(extents, [np.zeros((1, 100), np.uint8)], 3)
        more = np.zeros((3, 100), np.uint8)
        reader.move_source(source, [more])
        reader.wait(reader.submit(source, np.array([0, 1, 2]), np.array([2, 1, 0])))
    wanted = [data[350:450], data[:100], data[700:800]]
    np.testing.assert_array_equal(more, wanted)
