"""Units arrive in the memory MLX multiplies from, and stay until nobody needs them."""

import os

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.errors import FlashError
from mlx_flash.memory import slots as slots_module
from mlx_flash.memory.allocation import allocate
from mlx_flash.memory.policies import Lru, Window
from mlx_flash.storage.limits import LARGE_PAGE_BYTES
from mlx_flash.storage.native_reader import _reader
from mlx_flash.storage.reader import ReadResult

NATIVE = [
    pytest.param(
        True, marks=pytest.mark.skipif(_reader is None, reason="no C reader"), id="C"
    ),
    pytest.param(False, id="Python"),
]


@pytest.fixture(autouse=True)
def no_reader_left(bench):
    yield
    bench.close()


class FakeReader:
    """Stands in for the SSD: copies rows, and fails when told to."""

    def __init__(self, bench):
        self.rows = [np.array(bench.up), np.array(bench.down).T.copy()]
        self.fails = False
        self.batches = []
        self.waited = self.drained = 0

    def add_source(self, extents, views, units, stored=None):
        self.views = views
        return 0

    def move_source(self, source, views):
        self.views = views

    def drain(self):
        self.drained += 1

    def submit(self, source, units, slots, guess=False):
        self.batches.append((units.tolist(), slots.tolist()))
        for view in self.views:
            view[slots] = 0xEE  # from now on the old bytes may be gone at any time
        return units, slots

    def wait(self, ticket):
        self.waited += 1
        units, slots = ticket
        for view, rows in zip(self.views, self.rows, strict=True):
            if self.fails:
                view[slots] = 0xEE  # half-read units are garbage
            else:
                view[slots] = rows[units].view(np.uint8)
        if self.fails:
            raise FlashError("the disk failed")
        return ReadResult(100 * len(units), len(units), 0.5)


def ids(*units):
    return np.array(units, np.int32)


def fetch_all(store, units):
    """Every wave evaluated on the spot: {unit: (up row, down row)}."""
    rows = {}

    def note(total, wave):
        up, down = (np.array(store.parts[p][mx.array(wave.slots)]) for p in PARTS)
        rows.update({u: (up[i], down[i]) for i, u in enumerate(wave.units.tolist())})

    store.run(units, note)
    return rows


def waves_of(store, units):
    """The waves of a step whose results nobody wants."""
    waves = []
    store.run(units, lambda total, wave: waves.append(wave))
    return waves


def lazy_rows(store):
    """What multiplies nothing and evaluates nothing: the up rows of every wave."""

    def multiply(total, wave):
        rows = store.parts["fc1.weight"][mx.array(wave.slots)] * 1
        return [*(total or []), rows]

    return multiply


class Stop(Exception):
    """Raised in the middle of a step."""


PARTS = ("fc1.weight", "fc2.weight")


def check_rows(bench, rows):
    up, down = np.array(bench.up), np.array(bench.down)
    for unit, (got_up, got_down) in rows.items():
        np.testing.assert_array_equal(got_up, up[unit])
        np.testing.assert_array_equal(got_down, down[:, unit])


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((1, 1), mx.uint8),
        ((3, 7), mx.float16),
        ((5, 4, 3), mx.float32),
        ((3, 4096), mx.float16),
        ((2, 16, 64), mx.uint32),
    ],
)
def test_allocated_memory_is_aligned_and_shared(shape, dtype):
    array, view = allocate(shape, dtype)
    assert array.shape == shape and array.dtype == dtype
    if view.shape[1] % 4096 == 0:  # direct I/O reads straight into such rows
        assert view.ctypes.data % LARGE_PAGE_BYTES == 0
    assert view.shape == (shape[0], array.nbytes // shape[0])
    assert not np.array(array.view(mx.uint8)).any()
    view[:] = np.random.default_rng(0).integers(0, 60, view.shape)
    assert np.array(array.view(mx.uint8)).tobytes() == view.tobytes()


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("n_slots", [1, 5, 12, 23, 24])
def test_every_wave_has_the_bytes_of_its_units(bench, n_slots, native):
    store = bench.store(n_slots, native=native)
    rng = np.random.default_rng(n_slots)
    for _ in range(20):
        count = rng.integers(0, bench.UNITS + 1)
        asked = np.sort(rng.choice(bench.UNITS, count, replace=False)).astype(np.int32)
        rows = fetch_all(store, asked)
        assert rows.keys() == set(asked.tolist())
        check_rows(bench, rows)


@given(st.lists(st.sets(st.integers(0, 23)).map(sorted), max_size=8), st.data())
def test_lazy_results_survive_later_waves(bench, steps, data):
    """MLX computes late. What it will read then must still be there."""
    n_slots = data.draw(st.integers(1, 24), "slots")
    policy = data.draw(st.sampled_from([Lru(), Window(1), Window(2)]), "policy")
    apart = data.draw(st.sampled_from([0.0, 0.5, 1.0]), "apart")
    store = bench.store(n_slots, policy, reader=FakeReader(bench), apart=apart)
    guesses = st.none() | st.sets(st.integers(0, 23)).map(sorted)
    lazy = []
    for asked in steps:
        early = data.draw(guesses, "read early")
        if early is not None:
            store.read_early(ids(*early))
        waves = []

        def multiply(total, wave, store=store, waves=waves):
            waves.append(wave)
            return lazy_rows(store)(total, wave)

        rows = store.run(ids(*asked), multiply)
        lazy += [(wave.units, r) for wave, r in zip(waves, rows, strict=True)]
    up = np.array(bench.up)
    for units, rows in reversed(lazy):
        np.testing.assert_array_equal(np.array(rows), up[units])


def test_a_lazy_result_survives_a_step_of_hits_before_the_overwriting_one(bench):
    store = bench.store(2, reader=FakeReader(bench))
    lazy = []
    for asked in (ids(0, 1), ids(0, 1), ids(2, 3)):
        lazy += store.run(asked, lazy_rows(store))
    up = np.array(bench.up)
    for rows, asked in zip(lazy, ([0, 1], [0, 1], [2, 3]), strict=True):
        np.testing.assert_array_equal(np.array(rows), up[asked])


def test_a_failed_read_is_forgotten_and_done_again(bench):
    reader = FakeReader(bench)
    store = bench.store(3, reader=reader)
    fetch_all(store, ids(0, 1))
    reader.fails = True
    with pytest.raises(FlashError, match="disk failed"):
        waves_of(store, ids(1, 2, 3))
    assert store.cache.unit_of[store.cache.valid].tolist() == [1]
    reader.fails = False
    reader.batches.clear()
    rows = fetch_all(store, ids(1, 2, 3))
    assert [units for units, _ in reader.batches] == [[2, 3]]
    check_rows(bench, rows)


def test_the_next_wave_is_read_while_one_is_multiplied(bench):
    reader = FakeReader(bench)
    store = bench.store(4, reader=reader)
    begun = []

    def multiply(total, wave):
        begun.append(len(reader.batches))
        return lazy_rows(store)(total, wave)

    store.run(ids(*range(8)), multiply)
    assert begun == [2, 3, 4, 4]


def test_what_nobody_asks_for_any_more_is_waited_for(bench):
    """Else it would land in slots that were given to others meanwhile."""
    reader = FakeReader(bench)
    store = bench.store(4, reader=reader)

    def stop(total, wave):
        raise Stop

    with pytest.raises(Stop):
        store.run(ids(*range(8)), stop)
    assert len(reader.batches) == 2 and reader.waited == 1
    assert reader.drained == 0
    check_rows(bench, fetch_all(store, ids(0, 1, 2, 3)))
    assert reader.drained == 1
    assert reader.batches[2][0] == [2, 3]  # the first wave had come


def test_what_is_there_is_multiplied_while_the_rest_is_read(bench):
    reader = FakeReader(bench)
    store = bench.store(8, reader=reader, apart=0.5)
    fetch_all(store, ids(0, 1, 2))
    seen = []

    def multiply(total, wave):
        assert reader.batches[-1][0] == [3, 4]
        seen.append((wave.units.tolist(), reader.waited))

    store.run(ids(1, 2, 3, 4), multiply)
    assert seen == [([1, 2], 1), ([3, 4], 2)]
    # more than half of the slots: one wave
    assert len(waves_of(store, ids(0, 1, 2, 3, 5))) == 1


def test_a_guess_is_read_before_it_is_asked_for(bench):
    reader = FakeReader(bench)
    store = bench.store(8, reader=reader)
    fetch_all(store, ids(0, 1))
    store.read_early(ids(1, 2, 3, 4))
    store.read_early(ids(9))  # one guess at a time
    assert [units for units, _ in reader.batches] == [[0, 1], [2, 3, 4]]
    check_rows(bench, fetch_all(store, ids(0, 2, 3, 7)))
    assert reader.batches[-1][0] == [7]
    stats = store.stats
    assert (stats.early, stats.early_right) == (3, 2)
    assert stats.early_precision == 2 / 3
    assert (stats.hits, stats.misses) == (1, 5)  # what had to be read is no hit
    assert stats.reads == 6


def test_a_guess_gives_up_at_most_half_of_the_slots(bench):
    reader = FakeReader(bench)
    store = bench.store(4, reader=reader)
    fetch_all(store, ids(0, 1, 2, 3))
    store.read_early(ids(4, 5, 6, 7))
    assert reader.batches[-1][0] == [4, 5]
    check_rows(bench, fetch_all(store, ids(0, 1, 4, 5)))


def test_a_guess_that_cannot_be_read_is_left_to_whoever_needs_it(bench):
    reader = FakeReader(bench)
    store = bench.store(8, reader=reader)
    store.read_early(ids(1, 2))
    reader.fails = True
    with pytest.raises(FlashError):
        waves_of(store, ids(1))
    store.read_early(ids(3))
    assert not waves_of(store, ids())[0].units.size
    store.read_early(ids(5))
    assert not waves_of(store, ids())[0].units.size
    assert not store.cache.valid.any()
    reader.fails = False
    check_rows(bench, fetch_all(store, ids(1, 2, 3)))


def test_a_failed_second_wave_leaves_the_first_sound(bench):
    reader = FakeReader(bench)
    store = bench.store(2, reader=reader)

    def multiply(total, wave):
        reader.fails = True

    with pytest.raises(FlashError):
        store.run(ids(0, 1, 2, 3), multiply)
    reader.fails = False
    assert store.cache.unit_of[store.cache.valid].tolist() == [0]
    check_rows(bench, fetch_all(store, ids(0, 1)))


def test_an_interruption_while_waiting_for_mlx_forgets_the_wave(bench, monkeypatch):
    """The units count as present before they are read; Ctrl-C may come in between."""
    store = bench.store(2, reader=FakeReader(bench))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(slots_module.mx, "eval", interrupt)
    with pytest.raises(KeyboardInterrupt):
        waves_of(store, ids(0, 1))
    monkeypatch.undo()
    check_rows(bench, fetch_all(store, ids(0, 1)))


def test_counters_agree_with_what_the_reader_was_asked(bench):
    reader = FakeReader(bench)
    store = bench.store(4, reader=reader)
    for asked in ([0, 1, 2], [1, 2, 3], [0, 3], [4, 5, 6, 7, 8, 9], []):
        waves_of(store, ids(*asked))
    stats = store.stats
    # 0, 1 and 2; then 3 only; then nothing; then six in waves of half the slots
    assert [units for units, _ in reader.batches] == [
        [0, 1, 2],
        [3],
        [4, 5],
        [6, 7],
        [8, 9],
    ]
    assert (stats.hits, stats.misses) == (4, 10)
    assert stats.hit_rate == 4 / 14
    assert (stats.bytes_read, stats.reads, stats.read_s) == (1000, 10, 2.5)
    assert stats.read_gb_per_s == 1000 / 1e9 / 2.5


@pytest.mark.parametrize("native", NATIVE)
def test_a_store_for_everything_has_unit_i_in_slot_i(bench, native):
    store = bench.store(bench.UNITS, native=native)
    store.read_all()
    assert store.holds_all
    assert store.cache.unit_of.tolist() == list(range(bench.UNITS))
    assert mx.array_equal(store.parts["fc1.weight"], bench.up).item()
    assert mx.array_equal(store.parts["fc2.weight"], bench.down.T).item()


def test_a_store_for_less_does_not_hold_all(bench):
    assert not bench.store(bench.UNITS - 1).holds_all


def test_a_file_that_changes_under_a_running_model_is_refused(bench):
    store = bench.store(5)
    waves_of(store, np.arange(5))
    when = os.stat(bench.path)
    os.utime(bench.path, ns=(when.st_atime_ns, when.st_mtime_ns + 1))
    with pytest.raises(FlashError, match="changed while its model was in use"):
        waves_of(store, np.arange(5, 9))
