"""What a run asked for is written down; replaying it counts what the run counted."""

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest
import stock_checkpoints as moe
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import mlx_flash
from mlx_flash import DEMO_MODEL, cli
from mlx_flash import sizing as loader
from mlx_flash.errors import FlashError
from mlx_flash.generation import stream_generate
from mlx_flash.memory.policies import Lrfu, Lru, Window
from mlx_flash.traces.recording import record
from mlx_flash.traces.replay import compare, even_slots, hit_rate, replay
from mlx_flash.traces.trace import Trace, read_trace
from mlx_flash.tracing import record_prompt

PROMPT = [2, 84, 266, 9, 31, 40]
POLICIES = {"lru": Lru(), "window": Window(4), "lrfu": Lrfu()}


@st.composite
def synthetic(draw):
    """A synthetic trace of one or two layers."""
    units = draw(st.lists(st.integers(1, 12), min_size=1, max_size=2))
    bits, tokens = [], []
    for n in units:
        ids = st.sets(st.integers(0, n - 1))
        steps = draw(st.lists(ids, min_size=1, max_size=10))
        fired = np.zeros((len(steps), n), bool)
        for row, chosen in zip(fired, steps, strict=True):
            row[list(chosen)] = True
        bits.append(np.packbits(fired, axis=1))
        counts = st.integers(1, 3)
        steps = draw(st.lists(counts, min_size=len(steps), max_size=len(steps)))
        tokens.append(np.array(steps, np.int32))
    sizes = tuple(8 * n for n in units)
    warm = tuple(draw(st.integers(0, len(t) - 1)) for t in tokens)
    names = ("synthetic", "neuron")
    keep = tuple(np.bitwise_and(b, 0x55) for b in bits)
    return Trace(*names, tuple(units), sizes, tuple(bits), keep, tuple(tokens), warm)


@pytest.fixture
def with_slots(monkeypatch):
    """with_slots(n): every layer loaded from now on has n slots."""

    def use(n):
        make = loader.make_budget

        def exactly(*args):
            budget = make(*args)
            return dataclasses.replace(budget, slots=(n,) * len(budget.slots))

        monkeypatch.setattr(loader, "make_budget", exactly)

    return use


def demo(**options):
    return mlx_flash.load(DEMO_MODEL, memory="90%", context=128, **options)


@pytest.fixture(scope="module")
def story():
    with mlx_flash.load(DEMO_MODEL, memory="50%", context=128) as (model, tokenizer):
        return record_prompt(model, tokenizer, PROMPT, 24)


@given(synthetic())
def test_a_file_holds_all_of_a_trace(trace):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        trace.save(path)
        again = read_trace(path)
    for field in ("model", "unit", "units", "unit_bytes", "warm"):
        assert getattr(again, field) == getattr(trace, field)
    for layer in range(len(trace.units)):
        for a, b in zip(again.steps(layer), trace.steps(layer), strict=True):
            assert a[0].tolist() == b[0].tolist() and a[1] == b[1]
            assert a[2].tolist() == b[2].tolist()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [100, 700])
def test_replay_counts_what_the_demo_model_counts(story, with_slots, policy, slots):
    """The trace was recorded with other slots than the run it is compared with."""
    with_slots(slots)
    with demo(policy=policy) as (model, tokenizer):
        for _ in stream_generate(model, tokenizer, PROMPT, max_tokens=24):
            pass
        counted = model.flash.report().hit_rate
    replayed = hit_rate(replay(story, POLICIES[policy], (slots,) * 4))
    assert 0.05 < counted < 0.95
    assert abs(replayed - counted) < 0.01


@pytest.mark.parametrize("policy", POLICIES)
def test_replay_counts_what_a_mixture_of_experts_counts(tmp_path, with_slots, policy):
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    folder = moe.write_checkpoint(tmp_path / "moe", moe.QWEN3)
    rng = np.random.default_rng(0)
    text = rng.integers(3, 97, 40).tolist()

    def run(slots):
        with_slots(slots)
        options = dict(page_cache=True, policy=policy)
        model = mlx_flash.load_model(folder, "1GB", **options)[0]
        with record(model.flash) as recorder:
            cache = make_prompt_cache(model)
            for token in text:
                mx.eval(model(mx.array([[token]]), cache=cache))
        stats = model.flash.stats
        model.flash.close()
        return recorder.trace(), stats

    trace, _ = run(4)
    for slots in (2, 3, 6):
        hits, asked = np.sum(replay(trace, POLICIES[policy], (slots,) * 2), axis=0)
        stats = run(slots)[1]
        assert asked == stats.hits + stats.misses == 2 * 40 * 3
        assert hits == stats.hits > 0


def test_a_trace_says_what_it_is_of(story):
    assert (story.model, story.unit, story.units) == (
        "demo_model",
        "neuron",
        (2048,) * 4,
    )
    assert story.unit_bytes == (1024,) * 4
    assert story.warm[0] >= 1
    sweep = next(story.steps(0))
    assert len(sweep[0]) == 2048, "a prompt is computed with every neuron"
    rest = [len(units) for units, *_ in story.steps(0)][story.warm[0] :]
    assert 0 < np.mean(rest) < 600


def best_by_trying(steps, held, slots):
    """Most hits any policy can have, by trying all of them."""
    from itertools import combinations

    if not steps:
        return 0
    asked = set(steps[0].tolist())
    others = held - asked
    room = slots - len(asked)
    kept = combinations(sorted(others), min(max(room, 0), len(others)))
    rest = max(best_by_trying(steps[1:], asked | set(k), slots) for k in kept)
    return len(asked & held) + rest


@given(st.lists(st.sets(st.integers(0, 5), max_size=3), min_size=1, max_size=7))
def test_the_optimum_is_the_best_of_all_policies(steps):
    fired = np.zeros((len(steps), 6), bool)
    for row, chosen in zip(fired, steps, strict=True):
        row[list(chosen)] = True
    tokens = (np.ones(len(steps), np.int32),)
    bits = (np.packbits(fired, axis=1),)
    keep = (np.zeros_like(bits[0]),)
    trace = Trace("synthetic", "expert", (6,), (8,), bits, keep, tokens, (0,))
    for slots in (3, 4):
        (hits, _), *_ = replay(trace, None, (slots,))
        steps_of_ids = [units for units, *_ in trace.steps(0)]
        assert hits == best_by_trying(steps_of_ids, set(), slots)


@given(synthetic(), st.floats(0.05, 1))
def test_no_policy_beats_the_optimum(trace, share):
    trace = dataclasses.replace(trace, warm=(0,) * len(trace.units))
    rates = compare(trace, [share])
    assert all(r[0] <= rates["optimum"][0] for r in rates.values())


@given(synthetic())
def test_with_room_for_all_only_first_uses_miss(trace):
    slots = even_slots(trace, 1.0)
    for policy in (Lru(), Lrfu(), None):
        for layer, (hits, asked) in enumerate(replay(trace, policy, slots)):
            steps = [set(units.tolist()) for units, *_ in trace.steps(layer)]
            seen = set().union(*steps[: trace.warm[layer]])
            later = set().union(*steps[trace.warm[layer] :])
            assert asked - hits == len(later - seen)


def test_recording_ends_with_its_block():
    with mlx_flash.load(DEMO_MODEL, memory="50%", context=64) as (model, _):
        with pytest.raises(RuntimeError), record(model.flash):
            assert all(layer.slots.listener for layer in model.flash.layers)
            raise RuntimeError
        assert not any(layer.slots.listener for layer in model.flash.layers)


def test_a_layer_held_whole_has_no_trace():
    with mlx_flash.load(DEMO_MODEL, memory="150%", context=64) as (model, tokenizer):
        with pytest.raises(FlashError, match="4 of 4 FFN layers asked for nothing"):
            record_prompt(model, tokenizer, PROMPT, 4)


@pytest.mark.parametrize("damage", ["cut", "text", "version", "units", "missing"])
def test_a_damaged_trace_is_named(story, tmp_path, damage):
    path = tmp_path / "a.npz"
    story.save(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-300])
    elif damage == "text":
        path.write_text("once upon a time")
    elif damage == "missing":
        path.unlink()
    else:
        arrays = dict(np.load(path))
        facts = json.loads(arrays["facts"].tobytes())
        facts |= {"version": {"version": 2}, "units": {"units": [9] * 4}}[damage]
        arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        np.savez(path, **arrays)
    with pytest.raises(FlashError, match=r"a\.npz"):
        read_trace(path)


def test_commands(tmp_path):
    path, text = tmp_path / "a.npz", tmp_path / "a.txt"
    text.write_text("Once upon a time there was a dog. The dog was big and red.")
    run = CliRunner().invoke
    made = run(cli.main, ["trace", "--text", str(text), "-o", str(path)])
    assert made.exit_code == 0 and "4 layers of neurons" in made.stderr
    shown = run(cli.main, ["replay", str(path)])
    assert shown.exit_code == 0 and "| window 4 | lru | lrfu |" in shown.stdout
    data = run(cli.main, ["replay", str(path), "--json"])
    assert set(json.loads(data.stdout)["hit_rates"]) >= {"lru", "lrfu", "optimum"}
    again = run(cli.main, ["trace", "A dog", "-m", "4", "-o", str(path)])
    assert again.exit_code == 0 and read_trace(path).warm[0] > 0
    both = run(cli.main, ["trace", "A", "--text", str(text), "-o", str(path)])
    assert both.exit_code == 2 and "either" in both.stderr


def test_a_text_without_words_is_refused(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("")
    command = ["trace", "--text", str(text), "-o", str(tmp_path / "a.npz")]
    result = CliRunner().invoke(cli.main, command)
    assert result.exit_code == 1
    assert result.stderr == "Error: The text is empty. Give some to read.\n"


def test_the_seed_of_a_trace_is_that_of_generate(tmp_path, monkeypatch):
    """Making a model draws random numbers: the seed is set after that."""
    seen = []

    def note(*args, **options):
        seen.append(np.array(mx.random.state[0]).tolist())
        raise FlashError("enough was seen")

    monkeypatch.setattr("mlx_flash.tracing.record_prompt", note)
    args = ["trace", "Once", "-o", str(tmp_path / "t.npz"), "--seed", "7"]
    CliRunner().invoke(cli.main, args)
    mx.random.seed(7)
    assert seen == [np.array(mx.random.state[0]).tolist()]
