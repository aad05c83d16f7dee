"""Predictors on activations whose truth is known, and what is written about them."""

import math

import mlx.core as mx
import numpy as np
import pytest
from conftest import FFN

from mlx_flash.converters.calibrate import fit
from mlx_flash.converters.calibrate.fit import fit_predictor, split
from mlx_flash.layers.predictor import Predictor, default_rank, wider_rank
from mlx_flash.storage.manifest import PredictorFacts

D, N, LENGTH = 48, 192, 64


def make_layer(rank=6, bias=-1.5, dtype=mx.float32, seed=0):
    """An FFN whose up projection truly has a low rank; most neurons are off."""
    rng = np.random.default_rng(seed)
    up = rng.normal(0, 1, (N, rank)) @ rng.normal(0, 1, (rank, D))
    up /= np.linalg.norm(up, axis=1, keepdims=True)
    ffn = FFN(D, N, bias is not None)
    ffn.fc1.weight = mx.array(up.astype(np.float32)).astype(dtype)
    if bias is not None:
        ffn.fc1.bias = mx.full((N,), bias).astype(dtype)
    ffn.set_dtype(mx.float32)  # with the values of the narrower type
    return ffn


def make_inputs(sequences=40, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, (sequences * LENGTH, D)).astype(np.float32)


def truth(inputs, layer):
    """Activations [T, N] in float64."""
    up = np.array(layer.fc1.weight).astype(np.float64)
    bias = 0 if "bias" not in layer.fc1 else np.array(layer.fc1.bias)
    return np.maximum(inputs @ up.T + bias, 0)


def guess(inputs, arrays):
    """What the written predictor says, reckoned anew in float64."""
    w = {
        k: np.array(a.astype(mx.float32)).astype(np.float64) for k, a in arrays.items()
    }
    return inputs @ w["reduce.weight"].T @ w["expand.weight"].T + w["bias"] > 0


def fit_it(inputs, layer, rank=6, seed=0, dtype=mx.float32, **options):
    return fit_predictor(inputs, layer, dtype, LENGTH, rank, seed=seed, **options)


@pytest.mark.parametrize("recall", [0.9, 0.95, 0.99])
def test_recall_is_reached_far_better_than_by_chance(recall):
    inputs, layer = make_inputs(), make_layer()
    arrays, facts = fit_it(inputs, layer, recall=recall)
    assert abs(facts.recall - recall) < 0.015
    assert 0.03 < facts.active_share < 0.1
    # Chance: to find 95 % of the active neurons, 95 % of all must be predicted.
    assert facts.predicted_share < 3 * facts.active_share
    assert facts.precision > 5 * facts.active_share
    assert facts.mass > facts.recall  # it is the weak ones that are missed
    # The same on text that the fit never saw.
    fresh = make_inputs(seed=2)
    active = truth(fresh, layer) > 0
    found = (guess(fresh, arrays) & active).sum() / active.sum()
    assert abs(found - recall) < 0.015


def test_training_beats_the_start(monkeypatch):
    """A rank below the truth's, where a good start alone is not enough."""
    inputs, layer = make_inputs(), make_layer(rank=12)
    _, trained = fit_it(inputs, layer, rank=6)
    monkeypatch.setattr(fit, "_train", lambda weights, *args: weights)
    _, start = fit_it(inputs, layer, rank=6)
    assert abs(start.recall - trained.recall) < 0.02
    assert trained.predicted_share < 0.95 * start.predicted_share


def test_a_quantised_predictor_is_trained_as_such():
    """Full rank, where all that is lost is lost by rounding."""
    rng = np.random.default_rng(3)
    up = rng.normal(0, 1, (192, 64)).astype(np.float32) / 8
    ffn = FFN(64, 192, True)
    ffn.fc1.weight, ffn.fc1.bias = mx.array(up), mx.full((192,), -1.5)
    inputs = rng.normal(0, 1, (40 * LENGTH, 64)).astype(np.float32)
    _, trained = fit_it(inputs, ffn, rank=64, steps=200, bits=3)
    _, afterwards = fit_it(inputs, ffn, rank=64, steps=200, rounded=False, bits=3)
    assert trained.bits == afterwards.bits == 3
    assert abs(trained.recall - afterwards.recall) < 0.02
    assert trained.predicted_share < 0.95 * afterwards.predicted_share


@pytest.mark.parametrize("named, rank, bits", [(0.14, 128, 4), (0.16, 192, 3)])
def test_layers_that_read_much_in_vain_get_more_rank(monkeypatch, named, rank, bits):
    def fake(inputs, ffn, dtype, length, rank, bits=4):
        return {}, PredictorFacts(rank, bits, 0.5, 0.95, 0.6, 0.99, named, 0.1)

    monkeypatch.setattr(fit, "fit_predictor", fake)
    inputs = np.zeros((LENGTH, 256), np.float32)
    found = fit.fit_of_needed_rank(inputs, None, mx.float16, LENGTH, 128)
    assert (found[1].rank, found[1].bits) == (rank, bits)


def test_wider_ranks_can_be_quantised():
    assert wider_rank(4096, 128) == 192
    assert wider_rank(4096, 1024) == 1536
    assert wider_rank(256, 128) == 192
    assert wider_rank(128, 64) is None  # 96 is no multiple of a group
    assert wider_rank(192, 128) is None  # nearly all of the width


def test_start_keeps_what_a_low_rank_can_keep():
    inputs, layer = make_inputs(), make_layer(rank=6)
    exact = inputs @ np.array(layer.fc1.weight).T + np.array(layer.fc1.bias)
    w = fit._start(inputs, layer.fc1.weight, layer.fc1.bias, 6, 0)
    scores = np.array(fit._scores(w, mx.array(inputs)))
    gain = (scores * exact).sum() / (exact * exact).sum()
    assert np.abs(scores - gain * exact).max() < 1e-2


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_facts_are_what_the_written_predictor_does(dtype):
    inputs, layer = make_inputs(), make_layer(dtype=dtype)
    arrays, facts = fit_it(inputs, layer, dtype=dtype, steps=50)
    assert all(a.dtype == dtype for a in arrays.values())
    test = inputs[split(len(inputs), LENGTH)[2]]
    h, said = truth(test, layer), guess(test, arrays)
    active = h > 0
    expected = {
        "recall": (active & said).sum() / active.sum(),
        "precision": (active & said).sum() / said.sum(),
        "mass": (h * said).sum() / h.sum(),
        "predicted_share": said.mean(),
        "active_share": active.mean(),
    }
    for name, value in expected.items():
        # A score within rounding of zero may fall on either side.
        assert abs(getattr(facts, name) - value) < 2e-3, name
    assert facts.rank == 6


def test_what_a_run_computes_is_what_was_measured():
    inputs, layer = make_inputs(), make_layer()
    arrays, facts = fit_it(inputs, layer, steps=50)
    predictor = Predictor(D, N, 6)
    predictor.load_weights(list(arrays.items()), strict=True)
    test = inputs[split(len(inputs), LENGTH)[2]]
    share = predictor(mx.array(test)).astype(mx.float32).mean().item()
    assert abs(share - facts.predicted_share) < 1e-3


def test_threshold_is_a_probability():
    inputs, layer = make_inputs(), make_layer()
    shares = []
    for threshold in (0.1, 0.5, 0.9):
        arrays, facts = fit_it(inputs, layer, threshold=threshold, steps=50)
        assert math.isclose(facts.threshold, threshold)
        shares.append(facts.predicted_share)
    assert shares[0] > shares[1] > shares[2] > 0
    # The cut is folded into the bias: scores above zero are those above the threshold.
    half = fit_it(inputs, layer, threshold=0.5, steps=50)[0]["bias"]
    moved = np.array(half - arrays["bias"])
    assert np.allclose(moved, math.log(0.9 / 0.1), atol=1e-4)


def test_same_text_same_predictor():
    inputs, layer = make_inputs(), make_layer()
    a, b = fit_it(inputs, layer, steps=20), fit_it(inputs, layer, steps=20)
    assert a[1] == b[1]
    assert all(np.array_equal(np.array(a[0][k]), np.array(b[0][k])) for k in a[0])


def test_without_an_up_bias():
    arrays, facts = fit_it(make_inputs(), make_layer(bias=None), steps=50)
    assert abs(facts.active_share - 0.5) < 0.02
    assert abs(facts.recall - 0.95) < 0.015


@pytest.mark.parametrize(
    "sequences, rank", [(2, 40), (3, 48), (1, 6), (40, 100), (40, 1)]
)
def test_any_rank_for_any_amount_of_text(sequences, rank):
    inputs = make_inputs(sequences)[: sequences * LENGTH - (5 if rank == 40 else 0)]
    if sequences == 1:
        inputs = inputs[:4]  # fewer tokens than the rank
    arrays, facts = fit_it(inputs, make_layer(), rank=rank, steps=5)
    assert arrays["reduce.weight"].shape == (rank, D)
    assert arrays["expand.weight"].shape == (N, rank)
    assert all(mx.isfinite(a).all().item() for a in arrays.values())
    assert facts.rank == rank and 0 <= facts.recall <= 1


@pytest.mark.parametrize("bias", [-100.0, 100.0])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_neurons_that_never_or_always_fire(bias, threshold):
    arrays, facts = fit_it(
        make_inputs(), make_layer(bias=bias), threshold=threshold, steps=30
    )
    assert all(mx.isfinite(a).all().item() for a in arrays.values())
    assert facts.active_share == (1 if bias > 0 else 0)
    assert facts.recall > 0.93
    if bias < 0:
        assert facts.recall == facts.mass == 1
        assert facts.predicted_share < 0.01 or threshold is None
    assert 0 <= facts.threshold <= 1


def test_inputs_that_are_all_zero():
    arrays, facts = fit_it(
        np.zeros((10 * LENGTH, D), np.float32), make_layer(), steps=5
    )
    assert all(mx.isfinite(a).all().item() for a in arrays.values())
    assert facts.active_share == 0


@pytest.mark.parametrize("sequences", [1, 2, 3, 5, 10, 50, 128])
def test_split_holds_whole_sequences_back(sequences):
    tokens = sequences * LENGTH
    train, choose, test = split(tokens, LENGTH)
    if sequences <= 2:
        assert train == choose == test == slice(0, tokens)
        return
    assert (train.start, train.stop) == (0, choose.start)
    assert (choose.stop, test.stop) == (test.start, tokens)
    for part in (train, choose, test):
        assert part.stop > part.start
        assert (part.stop - part.start) % LENGTH == 0
    assert (test.stop - test.start) == max(round(sequences / 10), 1) * LENGTH


def test_default_ranks_are_the_papers():
    ranks = [default_rank(i, 32, 4096) for i in range(32)]
    assert ranks == [128] * 28 + [1024] * 4  # OPT-6.7B
    assert default_rank(0, 4, 256) == 128
    assert default_rank(3, 4, 768) == 192
    assert default_rank(0, 2, 16) == 8
    assert default_rank(0, 1, 1) == 1
