"""Slots go where they save most, and never beyond the room there is."""

from itertools import product

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import mlx_flash
from mlx_flash import cli
from mlx_flash.cli.common import DEMO_MODEL
from mlx_flash.errors import FlashError
from mlx_flash.memory.divide import Curve, divide, hit_curves
from mlx_flash.memory.policies import Lru
from mlx_flash.traces.recording import Trace
from mlx_flash.traces.replay import replay


def synthetic(*layers):
    """A synthetic trace: of each layer its units and the ids of every step."""
    bits = []
    for units, steps in layers:
        fired = np.zeros((len(steps), units), bool)
        for row, ids in zip(fired, steps, strict=True):
            row[ids] = True
        bits.append(np.packbits(fired, axis=1))
    units = tuple(n for n, _ in layers)
    tokens = tuple(np.ones(len(b), np.int32) for b in bits)
    sizes = tuple(8 for _ in units)
    keep = tuple(np.zeros_like(b) for b in bits)
    names, warm = ("synthetic", "expert"), (0,) * len(units)
    return Trace(*names, units, sizes, tuple(bits), keep, tokens, warm)


@st.composite
def curves(draw):
    """Concave curves, hits for every number of slots."""
    made = []
    for _ in range(draw(st.integers(1, 3))):
        gains = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
        hits = np.cumsum([0, *sorted(gains, reverse=True)])
        made.append(Curve(tuple(range(len(hits))), tuple(hits.tolist())))
    return made


@given(curves(), st.integers(0, 16))
def test_no_division_of_concave_curves_hits_more(layers, room):
    n = len(layers)
    slots = divide(layers, [1] * n, room, [0] * n)
    assert sum(slots) <= room
    best = max(
        sum(c.hits[k] for c, k in zip(layers, ks, strict=True))
        for ks in product(*(c.slots for c in layers))
        if sum(ks) <= room
    )
    assert sum(c.hits[k] for c, k in zip(layers, slots, strict=True)) == best


@given(curves(), st.integers(0, 60), st.data())
def test_room_least_and_most_are_kept(layers, room, data):
    sizes = [data.draw(st.integers(1, 5)) for _ in layers]
    least = [data.draw(st.integers(0, c.slots[-1])) for c in layers]
    slots = divide(layers, sizes, room, least)
    assert all(
        a <= n <= c.slots[-1] for a, n, c in zip(least, slots, layers, strict=True)
    )
    taken = sum(n * b for n, b in zip(slots, sizes, strict=True))
    assert taken <= max(room, sum(n * b for n, b in zip(least, sizes, strict=True)))


def test_a_cliff_is_worth_its_whole_height():
    """A loop over 8 units hits nothing with fewer slots, everything with 8."""
    curve = Curve((0, 4, 8, 16), (0.0, 0.0, 80.0, 80.0))
    assert curve.hull() == [(10.0, 0, 8), (0.0, 8, 16)]


def test_curves_are_what_the_engine_counts():
    rng = np.random.default_rng(0)
    steps = [
        rng.choice(40, 4, replace=False, p=np.arange(1, 41) / 820) for _ in range(90)
    ]
    trace = synthetic((40, steps), (3, [[0], [1], [0]] * 30))
    found = hit_curves(trace, Lru())
    assert found[1].slots == (0, 1, 2, 3)
    for layer, curve in enumerate(found):
        assert curve.slots[0] == curve.hits[0] == 0
        assert curve.slots[-1] == trace.units[layer]
        for n, hits in list(zip(curve.slots, curve.hits, strict=True))[1:]:
            slots = [1, 1]
            slots[layer] = n
            assert replay(trace, Lru(), slots)[layer][0] <= hits
    assert replay(trace, Lru(), (40, 3))[0][0] == found[0].hits[-1]


def test_the_layer_that_repeats_gets_the_slots():
    often = [[i % 4, 4 + i % 3] for i in range(60)]
    never = [[i % 30] for i in range(60)]
    found = hit_curves(synthetic((30, often), (30, never)), Lru())
    slots = divide(found, [8, 8], 8 * 12, [1, 1])
    assert slots[0] >= 7 > slots[1]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    text, path = folder / "a.txt", folder / "a.npz"
    text.write_text("Once there was a red dog. The dog saw a big red ball. " * 4)
    command = ["trace", "--text", str(text), "-m", "60", "-o", str(path)]
    assert CliRunner().invoke(cli.main, command).exit_code == 0
    return path


@pytest.mark.parametrize("memory", ["50%", "65%", "80%"])
def test_a_model_divided_by_a_trace_keeps_its_budget(recorded, memory):
    options = dict(memory=memory, context=64)
    with mlx_flash.load(DEMO_MODEL, **options) as (model, _):
        even = model.flash.budget
    with mlx_flash.load(DEMO_MODEL, trace=recorded, **options) as (model, _):
        divided = model.flash.budget
        assert divided.slots == tuple(x.store.n_slots for x in model.flash.layers)
    assert divided.slots != even.slots and min(divided.slots) >= 32
    assert divided.total_bytes == even.total_bytes
    # What is gathered, at most half of the largest layer, still has its room.
    spare = divided.total_bytes - divided.slot_bytes - max(divided.slots) * 1024 // 2
    spare -= divided.resident_bytes + divided.predictor_bytes + divided.kv_bytes
    assert spare >= 0


def test_generate_takes_a_trace(recorded):
    command = ["generate", "A dog", "-m", "4", "--trace", str(recorded)]
    done = CliRunner().invoke(cli.main, command)
    assert done.exit_code == 0 and "hit" not in done.stdout


def test_a_trace_of_another_model_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    synthetic((8, [[0], [1]])).save(path)
    with pytest.raises(FlashError, match="1 layers of experts.*4 layers of neurons"):
        mlx_flash.load(DEMO_MODEL, memory="50%", context=64, trace=path)
