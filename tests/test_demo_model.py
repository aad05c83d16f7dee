"""The bundled demo model keeps what the README says of it, on a text of our own."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import mlx_flash
from mlx_flash.cli.common import DEMO_MODEL
from mlx_flash.inspection import verify
from mlx_flash.storage.manifest_reading import read_manifest

STORY = (
    "One day, a little girl named Sue went to the park with her mom. She saw a big "
    "red ball near a tree. Sue wanted to play with the ball, but a small dog was "
    'sitting on it. The dog was sad because it was lost. Sue said, "Do not be sad. I '
    'will help you find your home." They looked and looked. Then an old man came and '
    'said, "That is my dog! Thank you." The dog was very happy. Sue and the dog '
    "played with the ball all day."
)
CONTEXT = 128


def load(memory="50%", **options):
    return mlx_flash.load(DEMO_MODEL, memory=memory, context=CONTEXT, **options)


def mean_loss(model, ids) -> float:
    for layer in model.flash.layers:
        layer.sweep_tokens = len(ids) + 1  # predict for every token
    logits = model(mx.array([ids]))[0, :-1].astype(mx.float32)
    own = mx.take_along_axis(logits, mx.array(ids[1:])[:, None], axis=1)[:, 0]
    return (mx.logsumexp(logits, axis=1) - own).mean().item()


@pytest.fixture(scope="module")
def ids():
    with load() as (_, tokenizer):
        return tokenizer.encode(STORY)[:CONTEXT]


def test_every_digest_is_right():
    assert verify(DEMO_MODEL, lambda name: None) == []


def test_recorded_facts():
    manifest = read_manifest(DEMO_MODEL)
    assert manifest.model_bytes < 12e6
    assert manifest.ffn_bytes / manifest.model_bytes > 0.66
    facts = [layer.predictor for layer in manifest.layers]
    assert np.mean([f.active_share for f in facts]) < 0.1
    assert all(f.recall > 0.94 and f.mass > 0.98 for f in facts)
    assert all(f.predicted_share < 0.14 for f in facts)


def test_prediction_costs_less_than_two_percent_of_perplexity(ids):
    with load() as (model, _):
        predicted = mean_loss(model, ids)
        assert model.flash.stats.misses > 0
    with load(predictor=False) as (model, _):
        dense = mean_loss(model, ids)
    assert 2.5 < dense < 4.5
    assert predicted - dense < 0.02


def test_recall_on_a_swept_text_is_as_promised(ids):
    with load() as (model, _):
        mx.eval(model(mx.array([ids])))
        assert model.flash.stats.predictor_recall > 0.92
        assert model.flash.stats.swept_active > 1_000  # of the last batch


def test_a_larger_window_reads_less(ids):
    read, hits = [], []
    for window in (1, 2, 4):
        with load("70%", policy="window", window=window) as (model, _):
            cache = make_prompt_cache(model)
            for token in ids[:48]:
                mx.eval(model(mx.array([[token]]), cache=cache))
            read.append(model.flash.stats.misses)
            hits.append(model.flash.stats.hit_rate)
    assert read[0] > read[1] > read[2]
    assert hits == sorted(hits)
