"""NeuronFFN against float64 NumPy, for every number of slots and any choice."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_flash.errors import FlashError
from mlx_flash.layers.neuron import SWEEP_TOKENS, NeuronFFN
from mlx_flash.layers.predictor import Predictor
from mlx_flash.memory.policies import Lrfu, Lru, Window
from mlx_flash.memory.stats import Stats


@pytest.fixture(autouse=True)
def no_reader_left(bench):
    yield
    bench.close()


TOLERANCE = 1e-5  # float32, of the largest value; measured about 3e-7


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    diff = np.abs(np.array(actual) - expected).max() / np.abs(expected).max()
    assert diff < tolerance, f"{diff=}"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_slots", [1, 7, 12, 23, 24])
@pytest.mark.parametrize("shape", [(1,), (2, 1), (1, 3), (2, 5)])
def test_all_neurons_without_a_predictor(bench, n_slots, shape, bias):
    ffn = bench.ffn(n_slots, bias=bias)
    for seed in range(3):
        x = bench.inputs(*shape, seed=seed)
        y = ffn(x)
        assert y.dtype == x.dtype
        assert_close(y, bench.expected(x, bias=bias))


@st.composite
def choices(draw, most_tokens=SWEEP_TOKENS - 1):
    """Steps of 1 … most_tokens tokens, each with the neurons it chooses."""
    sets = st.sets(st.integers(0, 23), max_size=24)
    step = st.lists(sets, min_size=1, max_size=most_tokens)
    steps = draw(st.lists(step, min_size=1, max_size=6))
    masks = [np.zeros((len(step), 24), bool) for step in steps]
    for mask, step in zip(masks, steps, strict=True):
        for token, chosen in enumerate(step):
            mask[token, sorted(chosen)] = True
    return masks


@given(choices(), st.data())
def test_exactly_the_chosen_neurons_are_computed(bench, masks, data):
    n_slots = data.draw(st.integers(1, 23), "slots")
    policy = data.draw(
        st.sampled_from([Lru(), Lrfu(2), Window(1), Window(3)]), "policy"
    )
    late = data.draw(st.booleans(), "evaluate at the end")
    current = []
    ffn = bench.ffn(
        n_slots, lambda x: mx.array(current[-1]), policy=policy, native=False
    )
    asked = []
    ffn.slots.listener = lambda units, *_: asked.append(units)
    results = []
    for i, mask in enumerate(masks):
        current.append(mask)
        x = bench.inputs(len(mask), seed=i)
        y = ffn(x)
        if not late:
            mx.eval(y)
        results.append((y, bench.expected(x, mask)))
        np.testing.assert_array_equal(asked[-1], np.flatnonzero(mask.any(axis=0)))
    for y, expected in reversed(results):
        assert_close(y, expected)
    bench.close()


@pytest.mark.parametrize("n_slots", [1, 12, 23])
@pytest.mark.parametrize("T", [1, 3, SWEEP_TOKENS])
def test_a_predictor_that_always_says_yes_is_exact(bench, n_slots, T):
    ffn = bench.ffn(n_slots, lambda x: mx.ones((len(x), 24), mx.bool_))
    x = bench.inputs(T)
    assert_close(ffn(x), bench.expected(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("T", [1, 3])
def test_a_predictor_that_always_says_no_leaves_the_bias(bench, T, bias):
    ffn = bench.ffn(12, lambda x: mx.zeros((len(x), 24), mx.bool_), bias=bias)
    ffn(bench.inputs(SWEEP_TOKENS))  # slots are full, and must not be counted
    y = np.array(ffn(bench.inputs(T)))
    bias = np.array(bench.down_bias) if bias else 0
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))


def some(x):
    """A choice that depends on the token alone, about half of the neurons."""
    return (x[:, :1] * mx.arange(1, 25) * 1.7) % 1 > 0.5


@pytest.mark.parametrize("n_slots", [2, 12, 23])
@pytest.mark.parametrize("T", range(2, SWEEP_TOKENS))
def test_a_token_gets_the_same_beside_others(bench, n_slots, T):
    ffn = bench.ffn(n_slots, some)
    x = bench.inputs(T)
    together = ffn(x)
    alone = mx.concatenate([ffn(x[i : i + 1]) for i in range(T)])
    assert_close(together, np.array(alone))
    assert_close(together, bench.expected(x, some(x)))
    assert_close(ffn(x[None]), np.array(together)[None])


@pytest.mark.parametrize("policy", [Lru(), Window(1)])
def test_a_token_gets_the_same_whatever_the_slots_hold(bench, policy):
    x = bench.inputs(1, seed=5)
    for n_slots in (1, 5, 12, 23):
        ffn = bench.ffn(n_slots, some, policy=policy)
        for seed in range(4):
            ffn(bench.inputs(3, seed=seed))
        assert_close(ffn(x), bench.expected(x, some(x)))


@pytest.mark.parametrize("n_slots", [5, 23])
def test_many_tokens_sweep_all_neurons_and_judge_the_predictor(bench, n_slots):
    ffn = bench.ffn(n_slots, some)
    x = bench.inputs(SWEEP_TOKENS)
    assert_close(ffn(x), bench.expected(x))
    stats = ffn.slots.stats
    active = np.array(x @ bench.up.T + bench.up_bias > 0)
    assert stats.swept_active == active.sum()
    assert stats.swept_predicted == (active & np.array(some(x))).sum()
    assert stats.predictor_recall == stats.swept_predicted / stats.swept_active


def test_a_layer_held_whole_ignores_the_predictor(bench):
    ffn = bench.ffn(24, lambda x: mx.zeros((len(x), 24), mx.bool_))
    x = bench.inputs(1)
    assert_close(ffn(x), bench.expected(x))


def test_what_a_slot_held_before_is_never_counted(bench):
    """Most slots are multiplied where they lie; the unwanted ones must not add."""
    ffn = bench.ffn(12, lambda x: mx.array(current))
    for first, second in ((range(12), range(8)), (range(12), range(4, 16))):
        for chosen in (first, second):
            current = np.isin(np.arange(24), chosen)[None]
            x = bench.inputs(1)
            assert_close(ffn(x), bench.expected(x, current))


def test_several_tokens_at_once_age_a_window_by_as_many(bench):
    ffn = bench.ffn(12, lambda x: mx.arange(24)[None] == len(x), policy=Window(2))
    ffn(bench.inputs(1))  # uses neuron 1
    ffn(bench.inputs(3))  # uses neuron 3, for three tokens
    assert ffn.slots.cache.unit_of.max() == 3 and 1 not in ffn.slots.cache.unit_of


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("n_slots", [2, 8, 23])
def test_what_a_layer_before_guessed_changes_nothing(bench, n_slots, T):
    first = bench.ffn(n_slots, some)
    second = bench.ffn(n_slots, some, apart=0.5)
    first.look_ahead(second, lambda x, _: some(x))
    for seed in range(4):
        x = bench.inputs(T, seed=seed)
        second_x = bench.inputs(T, seed=seed + 1)  # not what the first one judged by
        assert_close(first(x), bench.expected(x, some(x)))
        assert_close(second(second_x), bench.expected(second_x, some(second_x)))
    assert second.slots.stats.early >= second.slots.stats.early_right > 0


def test_slots_are_no_parameters(bench):
    ffn = bench.ffn(12)
    names = {name for name, _ in tree_flatten(ffn.parameters())}
    assert names == {"fc1.bias", "fc2.bias"}


def test_a_closed_layer_says_so(bench):
    ffn = NeuronFFN(bench.module())
    with pytest.raises(FlashError, match="closed"):
        ffn(bench.inputs(1))


def test_the_predictor_compares_low_rank_scores_with_zero():
    predictor = Predictor(3, 4, 2)
    rng = np.random.default_rng(0)
    reduce, expand, bias, x = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((2, 3), (4, 2), (4,), (5, 3))
    )
    predictor.load_weights(
        [
            (n, mx.array(w))
            for n, w in zip(
                ("reduce.weight", "expand.weight", "bias"),
                (reduce, expand, bias),
                strict=True,
            )
        ]
    )
    expected = (x @ reduce.T) @ expand.T + bias > 0
    np.testing.assert_array_equal(np.array(predictor(mx.array(x))), expected)


# Counters


def test_counters_add_subtract_copy_and_reset():
    a, b = Stats(hits=5, read_s=2.0), Stats(hits=2, misses=1)
    assert a + b == Stats(hits=7, misses=1, read_s=2.0)
    assert (a + b) - b == a
    c = a.copy()
    c.hits = 9
    assert a.hits == 5
    a.reset()
    assert a == Stats()


def test_what_was_not_measured_is_none():
    stats = Stats()
    assert stats.hit_rate is stats.read_gb_per_s is stats.predictor_recall is None
