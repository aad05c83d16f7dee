"""The slot cache against a dictionary, on any sequence of steps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.memory.policies import Lrfu, Lru, Window
from mlx_flash.memory.slot_cache import EMPTY, SlotCache


class Model:
    """What the cache should hold, the slow way: {unit: when it was last used}."""

    def __init__(self, slots, window=None):
        self.slots, self.window, self.used, self.now = slots, window, {}, 0

    def begin(self, tokens):
        self.now += tokens
        if self.window is not None:
            first = self.now - self.window
            self.used = {u: t for u, t in self.used.items() if t >= first}

    def evicted_for(self, units):
        """When those that make room for a wave of `units` were used: the oldest."""
        others = [t for u, t in self.used.items() if u not in units]
        surplus = len(others) + len(units) - self.slots
        return sorted(others)[: max(surplus, 0)]

    def use(self, units, held):
        for unit in units:
            self.used[unit] = self.now
        self.used = {u: t for u, t in self.used.items() if u in held}


def held(cache):
    """{unit: slot}, after checking that both directions agree."""
    slots = np.flatnonzero(cache.unit_of != EMPTY)
    for slot in slots:
        assert cache.slot_of[cache.unit_of[slot]] == slot
    assert (cache.slot_of != EMPTY).sum() == len(slots)
    assert np.all(cache.last_used[cache.unit_of == EMPTY] == -1)
    return {int(cache.unit_of[slot]): int(slot) for slot in slots}


@st.composite
def traces(draw):
    units = draw(st.integers(1, 12))
    ids = st.sets(st.integers(0, units - 1)).map(sorted)
    steps = draw(st.lists(st.tuples(ids, st.integers(1, 5)), min_size=1, max_size=12))
    return units, [(np.array(ids, np.int32), tokens) for ids, tokens in steps]


def check_wave(cache, memory, wave):
    """`memory[slot]` is the unit whose bytes are there; the reader writes to it."""
    units, slots = wave.units.tolist(), wave.slots.tolist()
    missing = wave.missing.tolist()
    assert len(set(slots)) == len(slots) == len(units)
    assert set(zip(missing, wave.missing_slots.tolist(), strict=True)) <= set(
        zip(units, slots, strict=True)
    )
    memory.update(zip(wave.missing_slots.tolist(), missing, strict=True))
    now = held(cache)
    assert [now[unit] for unit in units] == slots
    for unit, slot in now.items():
        assert memory[slot] == unit, "a unit's bytes are not where it is said to be"


@given(traces(), st.data())
def test_waves_against_a_dictionary(trace, data):
    units, steps = trace
    slots = data.draw(st.integers(1, units), "slots")
    window = data.draw(st.none() | st.integers(1, 6), "window")
    cache = SlotCache(units, slots, Lru() if window is None else Window(window))
    model = Model(slots, window)
    memory = {}  # slot → unit
    for asked, tokens in steps:
        model.begin(tokens)
        present = set(model.used) & set(asked.tolist())
        got, hits, count, one = [], 0, 0, len(asked) <= slots
        for wave in cache.waves(asked, tokens):
            count += 1
            before = dict(model.used)
            oldest = model.evicted_for(set(wave.units.tolist()))
            check_wave(cache, memory, wave)
            gone = set(before) - set(held(cache)) - set(wave.units.tolist())
            if one:
                assert sorted(before[u] for u in gone) == oldest
            else:  # what is there comes first, what is read apart from it
                assert len(wave.missing) in (0, len(wave.units))
                assert hits == len(present) or not len(wave.missing)
            model.use(wave.units.tolist(), held(cache))
            got += wave.units.tolist()
            hits += len(wave.units) - len(wave.missing)
        assert sorted(got) == asked.tolist()
        assert hits == len(present)
        assert held(cache).keys() == model.used.keys()
        assert count == 1 or not one


@given(traces(), st.data())
def test_sweeps_leave_the_wave_before_alone_and_keep_what_they_should(trace, data):
    """Waves are multiplied one behind, and only if `ahead`: this keeps to it."""
    units, steps = trace
    slots = data.draw(st.integers(1, units), "slots")
    cache = SlotCache(units, slots, Lru())
    for asked, tokens in steps:
        chosen = data.draw(st.sets(st.sampled_from(asked.tolist() or [0])), "keep")
        keep = np.array(sorted(chosen & set(asked.tolist())), int)
        before, waves = None, 0
        for wave in cache.waves(asked, tokens, keep):
            waves += 1
            if before is not None and before.ahead:
                assert not set(wave.slots.tolist()) & set(before.slots.tolist())
            assert not wave.ahead or len(wave.units) <= slots // 2
            before = wave
        if waves > 1:
            assert set(keep[: slots // 2].tolist()) <= held(cache).keys()
            assert before.ahead == (slots - len(keep[: slots // 2]) > 1)


def test_what_a_sweep_was_told_to_keep_outlives_the_rest():
    cache = SlotCache(16, 8, Lru())
    list(cache.waves(np.arange(16), 5, np.array([1, 6])))
    step(cache, *range(10, 15))
    assert {1, 6} <= held(cache).keys()


@given(traces())
def test_a_larger_window_never_hits_less(trace):
    units, steps = trace

    def hits(policy):
        cache, count = SlotCache(units, units, policy), 0
        for asked, tokens in steps:
            for wave in cache.waves(asked, tokens):
                count += len(wave.units) - len(wave.missing)
        return count

    counts = [hits(Window(k)) for k in range(1, 8)] + [hits(Lru())]
    assert counts == sorted(counts)


def step(cache, *ids, tokens=1):
    """One step that fits one wave; returns what had to be read."""
    (wave,) = cache.waves(np.array(ids, np.int32), tokens)
    return wave.missing.tolist()


@pytest.mark.parametrize("window, read_again", [(1, True), (2, False)])
def test_window_counts_tokens_back_from_the_one_before(window, read_again):
    cache = SlotCache(8, 8, Window(window))
    assert step(cache, 3) == [3]
    assert step(cache, 3, 5) == [5]
    assert step(cache, 5) == []
    assert (step(cache, 3) == [3]) is read_again


def test_several_tokens_at_once_age_a_window_by_as_many():
    cache = SlotCache(8, 8, Window(3))
    step(cache, 1)
    step(cache, 2, tokens=3)
    assert held(cache).keys() == {1, 2}
    step(cache, 2, tokens=1)
    assert held(cache).keys() == {2}


def test_lru_overwrites_the_oldest():
    cache = SlotCache(8, 3, Lru())
    for unit in (0, 1, 2, 0):
        step(cache, unit)
    assert step(cache, 3) == [3]
    assert held(cache).keys() == {0, 2, 3}


@given(traces(), st.integers(1, 4), st.data())
def test_lrfu_evicts_the_smallest_decayed_count(trace, half_life, data):
    """Against the definition: every use counts 2 ** (-age / half-life)."""
    units, steps = trace
    slots = data.draw(st.integers(1, units), "slots")
    cache, uses, now = SlotCache(units, slots, Lrfu(half_life)), [], 0
    for asked, tokens in steps:
        now += tokens
        asked = asked[:slots]  # what fits: one wave
        before = held(cache).keys()
        if len(asked) < units:
            uses += [(unit, now) for unit in asked.tolist()]
        worth = [
            sum(2.0 ** ((then - now) / half_life) for u, then in uses if u == unit)
            for unit in range(units)
        ]
        list(cache.waves(asked, tokens))
        others = before - set(asked.tolist())
        kept = held(cache).keys() - set(asked.tolist())
        assert len(kept) == min(len(others), slots - len(asked))
        for gone in others - kept:
            assert all(worth[gone] <= worth[k] * (1 + 1e-9) for k in kept)


def test_lrfu_keeps_what_is_used_often():
    lru, lrfu = SlotCache(8, 2, Lru()), SlotCache(8, 2, Lrfu(8))
    for unit in (0, 0, 0, 1):
        step(lru, unit), step(lrfu, unit)
    assert step(lru, 2) == step(lrfu, 2) == [2]
    assert held(lru).keys() == {1, 2} and held(lrfu).keys() == {0, 2}


def test_lrfu_counts_for_any_length_of_text():
    cache = SlotCache(4, 2, Lrfu(8))
    for now in range(10_000):  # 2.0 ** (10_000 / 8) is no float
        step(cache, 0 if now < 8_000 else 1)
    step(cache, 2)
    assert held(cache).keys() == {1, 2}, "old uses of 0 count for nothing by now"


def test_lrfu_does_not_evict_what_the_step_needs():
    cache = SlotCache(8, 2, Lrfu(8))
    for unit in (0, 0, 0, 1):
        step(cache, unit)
    assert step(cache, 1, 2) == [2]
    assert held(cache).keys() == {1, 2}


def test_lrfu_layers_do_not_share_what_they_remember():
    policy = Lrfu(8)
    one, other = SlotCache(8, 2, policy), SlotCache(8, 2, policy)
    for _ in range(9):
        step(one, 0)
    for unit in (0, 1, 1, 2):
        step(other, unit)
    assert held(other).keys() == {1, 2}


@given(traces(), st.data())
def test_a_forgotten_unit_is_read_again(trace, data):
    """As after a read that failed: nothing of that wave's reads may count."""
    units, steps = trace
    slots = data.draw(st.integers(1, units), "slots")
    cache = SlotCache(units, slots, Lru())
    for asked, tokens in steps:
        for wave in cache.waves(asked, tokens):
            if data.draw(st.booleans(), "the read fails"):
                cache.forget(wave.missing_slots)
                assert not held(cache).keys() & set(wave.missing.tolist())
                kept = set(wave.units.tolist()) - set(wave.missing.tolist())
                assert kept <= held(cache).keys()
                break
    everything = np.arange(units, dtype=np.int32)
    before = held(cache).keys()
    read = [u for w in cache.waves(everything) for u in w.missing.tolist()]
    assert sorted(read) == sorted(set(range(units)) - before)


def test_forgetting_nothing_changes_nothing():
    cache = SlotCache(4, 2, Lru())
    step(cache, 1, 2)
    cache.forget(np.array([], np.int32))
    assert held(cache).keys() == {1, 2}


def test_an_own_policy_decides_what_expires():
    class KeepNothing(Lru):
        def expire(self, cache):
            cache.forget(np.flatnonzero(cache.unit_of != EMPTY))

    cache = SlotCache(4, 4, KeepNothing())
    assert step(cache, 1, 2) == step(cache, 1, 2) == [1, 2]


@pytest.mark.parametrize("slots", [0, 5, -1])
def test_impossible_slots_are_refused(slots):
    with pytest.raises(ValueError, match="slots for 4 units"):
        SlotCache(4, slots, Lru())


def test_a_window_of_nothing_is_refused():
    with pytest.raises(ValueError, match="keeps nothing"):
        Window(0)


def test_a_half_life_of_nothing_is_refused():
    with pytest.raises(ValueError, match="remembers nothing"):
        Lrfu(0)
