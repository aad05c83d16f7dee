"""Slots under any sequence of steps, guesses, failed reads and interruptions.

Hypothesis chooses the sequence. After every step the bookkeeping agrees with itself,
and a slot that counts as VALID holds the bytes of its unit.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from mlx_flash.errors import FlashError
from mlx_flash.memory import fence as fence_module
from mlx_flash.memory import slots as slots_module
from mlx_flash.memory.fence import Fence
from mlx_flash.memory.policies import EMPTY, Lrfu, Lru, Window
from mlx_flash.memory.slot_cache import SlotCache
from mlx_flash.memory.slots import UnitSlots
from mlx_flash.memory.stats import Stats
from mlx_flash.storage.manifest import Layer, Part
from mlx_flash.storage.reader import ReadResult

UNITS = 12
WIDTH = 4  # of a unit's row
SETTINGS = settings(max_examples=60, stateful_step_count=30, deadline=None)
units_sets = st.sets(st.integers(0, UNITS - 1)).map(
    lambda units: np.array(sorted(units), np.int64)
)
policies = st.sampled_from([Lru(), Window(2), Window(5), Lrfu(2), Lrfu(16)])
aparts = st.sampled_from([0.0, 0.5, 1.0])


def check_bookkeeping(cache):
    """Units and slots name each other, and what is VALID belongs to a unit."""
    for slot, unit in enumerate(cache.unit_of):
        assert unit == EMPTY or cache.slot_of[unit] == slot
        assert unit != EMPTY or not cache.valid[slot]
    assert (cache.slot_of != EMPTY).sum() == (cache.unit_of != EMPTY).sum()


class SlotCacheMachine(RuleBasedStateMachine):
    """The bookkeeping alone; `memory[slot]` is the unit whose bytes are there."""

    @initialize(slots=st.integers(1, UNITS), policy=policies, apart=aparts)
    def begin(self, slots, policy, apart):
        self.cache = SlotCache(UNITS, slots, policy, apart)
        self.memory = {}

    def read(self, units, slots):
        self.memory.update(zip(slots.tolist(), units.tolist(), strict=True))
        self.cache.arrived(slots)

    @rule(
        units=units_sets,
        tokens=st.integers(1, 4),
        kept=units_sets,
        stop=st.none() | st.integers(0, 3),
    )
    def step(self, units, tokens, kept, stop):
        """A step, or one that stops before the reads of wave `stop` have ended."""
        keep, seen = np.intersect1d(units, kept), []
        before = None
        for number, wave in enumerate(self.cache.waves(units, tokens, keep)):
            if before is not None and before.ahead:
                assert not set(before.slots) & set(wave.missing_slots)
            if number == stop:
                for slot in wave.missing_slots.tolist():
                    self.memory[slot] = None
                self.cache.recover()
                return
            self.read(wave.missing, wave.missing_slots)
            assert [self.memory[slot] for slot in wave.slots] == wave.units.tolist()
            assert self.cache.valid[wave.slots].all()
            seen += wave.units.tolist()
            before = wave
        assert sorted(seen) == units.tolist()

    @rule(units=units_sets, arrives=st.booleans())
    def guess(self, units, arrives):
        missing, slots = self.cache.early(units)
        assert len(missing) <= len(self.cache.unit_of) // 2
        for slot in slots.tolist():
            self.memory[slot] = None
        if arrives:
            self.read(missing, slots)
        else:
            self.cache.forget(slots)

    @invariant()
    def agrees(self):
        if hasattr(self, "cache"):
            check_bookkeeping(self.cache)
            for slot in np.flatnonzero(self.cache.valid).tolist():
                assert self.memory[slot] == self.cache.unit_of[slot]


class Interrupted(Exception):
    """What Ctrl-C is in these tests."""


@dataclass
class Batch:
    """Units on their way into slots of `view`."""

    view: np.ndarray
    units: np.ndarray
    slots: np.ndarray
    ended: bool = False


class FakeReader:
    """Reads of which each may fail; destroys slots as soon as reads may land there.

    `fails` says of the next reads whether they do, `interrupt` at which call of this
    reader an exception comes.
    """

    def __init__(self):
        self.truth = np.arange(1, UNITS * WIDTH + 1, dtype=np.float32)
        self.truth = self.truth.reshape(UNITS, WIDTH)
        self.views, self.batches, self.fails = [], [], []
        self.calls, self.interrupt = 0, None

    def add_source(self, extents, views, units, stored=None):
        self.views += views
        return len(self.views) - 1

    def move_source(self, source, views):
        self.drain()
        (self.views[source],) = views
        self.pass_call()

    def pass_call(self):
        self.calls += 1
        if self.calls == self.interrupt:
            raise Interrupted

    def submit(self, source, units, slots, guess=False):
        self.pass_call()
        batch = Batch(self.views[source], units.copy(), slots.copy())
        self.batches.append(batch)
        batch.view[slots] = 0xFF  # no numbers
        self.pass_call()
        return batch

    def finish(self, batch):
        if not batch.ended:
            batch.ended = True
            batch.view[batch.slots] = self.truth[batch.units].view(np.uint8)

    def wait(self, batch):
        self.pass_call()
        if self.fails and self.fails.pop():
            batch.ended = True
            batch.view[batch.slots] = 0xFF
            raise FlashError("the disk failed")
        self.finish(batch)
        self.drain()  # what nobody waits for may land at any time, and does so here
        self.pass_call()
        return ReadResult(1, 1, 0.0)

    def drain(self):
        for batch in self.batches:
            self.finish(batch)
        self.batches.clear()


PART = Part("rows", "float32", (WIDTH,), 0, 4 * WIDTH)
LAYER = Layer("mlp", "ffn", "", 0, UNITS, 4 * WIDTH, (PART,), "", None)
layers = st.integers(0, 1)


class UnitSlotsMachine(RuleBasedStateMachine):
    """Two layers of a model, whose results stay lazy as long as the caller likes."""

    @initialize(slots=st.integers(1, UNITS), policy=policies, apart=aparts)
    def begin(self, slots, policy, apart):
        self.reader, self.lazy, fence = FakeReader(), [], Fence()
        args = policy, self.reader, fence, Stats(), apart
        # Results are begun to save time. Here nothing is computed before it must be.
        self.patch = pytest.MonkeyPatch()
        for module in (fence_module, slots_module):
            self.patch.setattr(module, "begin", lambda *results: None)
        self.layers = [UnitSlots(LAYER, [], slots, *args) for _ in range(2)]

    def teardown(self):
        self.patch.undo()

    @rule(
        layer=layers,
        units=units_sets,
        tokens=st.integers(1, 4),
        fails=st.lists(st.booleans(), max_size=2),
        interrupt=st.none() | st.integers(1, 12),
    )
    def step(self, layer, units, tokens, fails, interrupt):
        slots, seen = self.layers[layer], []

        def multiply(total, wave):
            self.reader.pass_call()
            rows = slots.parts["rows"][mx.array(wave.slots)] * 2
            seen.extend(wave.units.tolist())
            return [*(total or []), rows]  # not computed yet

        self.reader.fails = list(fails)
        self.reader.calls, self.reader.interrupt = 0, interrupt
        try:
            total = slots.run(units, multiply, tokens)
        except (FlashError, Interrupted):
            assert any(fails) or interrupt is not None
            return
        finally:
            self.reader.fails, self.reader.interrupt = [], None
        assert sorted(seen) == units.tolist()
        if len(units):
            self.lazy.append((seen, total))

    @rule(layer=layers, units=units_sets, interrupt=st.none() | st.integers(1, 2))
    def guess(self, layer, units, interrupt):
        self.reader.calls, self.reader.interrupt = 0, interrupt
        try:
            self.layers[layer].read_early(units)
        except Interrupted:
            pass
        self.reader.interrupt = None

    @rule(
        layer=layers,
        n_slots=st.integers(1, UNITS),
        spare_units=st.integers(0, UNITS),
        fails=st.booleans(),
        interrupt=st.none() | st.integers(1, 6),
    )
    def resize(self, layer, n_slots, spare_units, fails, interrupt):
        self.reader.fails = [fails]
        self.reader.calls, self.reader.interrupt = 0, interrupt
        slots = self.layers[layer]
        try:
            slots.resize(n_slots, spare_units * 4 * WIDTH)
        except (FlashError, Interrupted):
            assert fails or interrupt is not None
        else:
            assert slots.n_slots == n_slots
            assert slots.holds_all == (n_slots == UNITS)
        self.reader.fails, self.reader.interrupt = [], None

    @precondition(lambda self: getattr(self, "lazy", None))
    @rule()
    def evaluate(self):
        """Results that were left lazy are those of the units they were asked of."""
        for units, total in self.lazy:
            rows = np.concatenate([np.array(piece) for piece in total])
            assert (rows == 2 * self.reader.truth[units]).all()
        self.lazy.clear()

    @rule(layer=layers, units=units_sets)
    def undisturbed(self, layer, units):
        self.step(layer, units, 1, [], None)
        self.evaluate()

    @invariant()
    def holds_what_it_says(self):
        for slots in getattr(self, "layers", []):
            cache = slots.cache
            if not slots._in_step:  # else `recover` comes first
                check_bookkeeping(cache)
            for slot in np.flatnonzero(cache.valid):
                row = np.array(slots.parts["rows"][int(slot)])
                assert (row == self.reader.truth[cache.unit_of[slot]]).all()


TestSlotCacheMachine = SlotCacheMachine.TestCase
TestSlotCacheMachine.settings = SETTINGS
TestUnitSlotsMachine = UnitSlotsMachine.TestCase
TestUnitSlotsMachine.settings = SETTINGS
