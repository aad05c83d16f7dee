"""Pictures of a model: the figures of its report, and never an error."""

import base64
import json
import threading

import numpy as np
import pytest

import mlx_flash
from mlx_flash.memory.policies import Lru
from mlx_flash.memory.slot_cache import SlotCache
from mlx_flash.server import monitor as module
from mlx_flash.server.meter import Meter
from mlx_flash.server.monitor import COLUMNS, Monitor, held_units, sizes, summed

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def loaded():
    with mlx_flash.load(mlx_flash.DEMO_MODEL, memory="50%") as (model, tokenizer):
        yield model, tokenizer


def monitor_of(model):
    return Monitor(model.flash, Meter(), "demo", chat=False)


def row(text, kind):
    return np.frombuffer(base64.b64decode(text), kind)


def test_figures_are_those_of_the_report(loaded):
    model, tokenizer = loaded
    mlx_flash.generate(model, tokenizer, PROMPT, max_tokens=12)
    report = model.flash.report()
    state = monitor_of(model).state()
    answer = state.answer
    assert answer.tokens == report.generation_tokens == 12
    assert answer.hit_rate == report.hit_rate
    assert answer.bytes_per_token == report.bytes_per_token
    assert answer.waits_per_token == report.waits_per_token
    assert answer.tokens_per_s == report.tokens_per_s
    assert answer.read_gb_per_s == report.read_gb_per_s
    assert answer.first_token_s == report.time_to_first_token_s
    parts = answer.io_s, answer.cache_s, answer.compute_s
    named = [report.ms_per_token[name] for name in ("io", "cache", "compute")]
    assert [1e3 * part / 11 for part in parts] == pytest.approx(named)
    memory = state.memory
    assert memory.budget == report.memory_budget_bytes
    assert memory.slots == report.slot_bytes
    parts = memory.resident, memory.predictors, memory.slots, memory.kv_cache
    assert sum(parts) + memory.workspace == memory.budget
    assert memory.held <= memory.peak
    assert memory.peak >= report.peak_memory_bytes


def test_rows_of_the_map_are_what_the_slots_hold(loaded):
    model, tokenizer = loaded
    mlx_flash.generate(model, tokenizer, PROMPT, max_tokens=4)
    layers = monitor_of(model).state().layers
    assert len(layers) == len(model.flash.layers)
    for layer, ffn in zip(layers, model.flash.layers, strict=True):
        slots = ffn.slots
        assert (layer.units, layer.slots) == (slots.units, slots.n_slots)
        assert layer.held_units == np.count_nonzero(slots.cache.valid)
        asked = row(layer.asked, "<u4")
        assert len(asked) == COLUMNS < layer.units
        assert asked.sum() == slots.asked.counts().sum() > 0
        shares = row(layer.held, np.uint8) / 255 * sizes(layer.units)
        assert shares.sum() == pytest.approx(layer.held_units, abs=COLUMNS / 8)


def test_a_layer_held_whole_is_held_everywhere():
    with mlx_flash.load(mlx_flash.DEMO_MODEL, memory="100MB") as (model, _):
        layers = monitor_of(model).state().layers
    assert all(layer.whole and layer.held_units == layer.units for layer in layers)
    assert set(row(layers[0].held, np.uint8)) == {255}


@pytest.mark.parametrize("units", [1, 8, 255, 256, 257, 30_001])
def test_columns_have_about_as_many_units_each(units):
    values = np.arange(units)
    columns = summed(values)
    assert len(columns) == min(units, COLUMNS)
    assert columns.sum() == values.sum()
    assert sizes(units).sum() == units
    assert sizes(units).max() - sizes(units).min() <= 1


def test_a_torn_picture_is_no_error():
    """A slot may have lost its unit between two looks."""

    class Slots:
        units = 4
        cache = SlotCache(4, 2, Lru())

    Slots.cache.valid[:] = True
    Slots.cache.unit_of[:] = [3, -1]
    assert held_units(Slots).tolist() == [False, False, False, True]


def test_reading_while_a_model_works_disturbs_nothing(loaded):
    model, tokenizer = loaded
    expected = mlx_flash.generate(model, tokenizer, PROMPT, max_tokens=30)
    pictures, errors, done = [], [], threading.Event()
    watched = monitor_of(model)

    def watch():
        try:
            while not done.is_set():
                watched.mark()
                pictures.append(json.dumps(watched.state(), default=vars))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        actual = mlx_flash.generate(model, tokenizer, PROMPT, max_tokens=30)
        model.flash.resize("60%")
        model.flash.resize("50%")
    finally:
        done.set()
        thread.join()
    assert actual == expected and not errors
    tokens = [json.loads(picture)["answer"]["tokens"] for picture in pictures]
    assert len(set(tokens)) > 1


def test_no_lock_of_a_step_is_taken(loaded):
    model, _ = loaded
    seen = []
    watched = monitor_of(model)
    with model.flash._fence.lock:
        thread = threading.Thread(target=lambda: seen.append(watched.state()))
        thread.start()
        thread.join(60)
    assert seen


def test_before_any_answer_and_after_the_end():
    model, _ = mlx_flash.load(mlx_flash.DEMO_MODEL, memory="50%")
    watched = monitor_of(model)
    assert watched.state().answer is None
    model.flash.close()
    assert watched.state().layers == []


def test_several_who_watch_share_a_picture(loaded, monkeypatch):
    watched = monitor_of(loaded[0])
    monkeypatch.setattr(module, "KEEP_S", 1e9)
    assert watched.json() is watched.json()
    monkeypatch.setattr(module, "KEEP_S", -1)
    assert watched.json() is not watched.json()


def test_a_mark_changes_with_what_there_is_to_see(loaded):
    model, tokenizer = loaded
    watched = monitor_of(model)
    before = watched.mark()
    assert watched.mark() == before
    mlx_flash.generate(model, tokenizer, PROMPT, max_tokens=2)
    assert watched.mark() != before
