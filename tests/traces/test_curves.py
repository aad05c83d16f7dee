"""A trace divides a model's memory by the hits that the engine would count on it."""

import numpy as np
import pytest
from click.testing import CliRunner

import mlx_flash
from mlx_flash import DEMO_MODEL, cli
from mlx_flash.errors import FlashError
from mlx_flash.memory.divide import divide
from mlx_flash.memory.policies import Lru
from mlx_flash.traces.curves import hit_curves
from mlx_flash.traces.replay import replay
from mlx_flash.traces.trace import Trace


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
        assert divided.slots == tuple(x.slots.n_slots for x in model.flash.layers)
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
