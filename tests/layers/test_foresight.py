"""Foresight is learned, found, used for keeping and reading, and changes no result."""

import mlx.core as mx
import numpy as np
import pytest
from stock_checkpoints import QWEN3, assert_same, run, stream, write_checkpoint

from mlx_flash.checkpoints import foresight_file
from mlx_flash.checkpoints.foresight_file import (
    find_foresight,
    foresight_facts,
    learned_path,
    write_foresight,
)
from mlx_flash.errors import FlashError
from mlx_flash.layers.foresight import Foresight
from mlx_flash.learning import PRECISION, learn
from mlx_flash.memory.policies import Foreseen, Lrfu

NAME = "qwen3_moe"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / NAME
    write_checkpoint(folder, QWEN3)
    return folder


def pieces(model, count=12, length=64):
    drawn = np.random.default_rng(0)
    return drawn.integers(3, model.flash.vocabulary, (count, length)).tolist()


@pytest.fixture
def learned(folder):
    """The checkpoint, of which foresight was learned into the cache folder."""
    model = stream(folder, 4)
    found, facts = learn(model, pieces(model), progress=False)
    manifest = model.flash.manifest
    write_foresight(learned_path(folder), manifest, found, facts)
    model.flash.close()
    return folder, manifest


def test_what_was_learned_is_found_again(learned):
    folder, manifest = learned
    path = find_foresight(folder, manifest)
    assert path == learned_path(folder)
    facts = foresight_facts(path)
    assert facts["tokens"] == 12 * 64
    assert len(facts["recall"]) == len(manifest.layers) - 1


def test_it_names_the_next_layers_experts(folder):
    """A random model's routers hear what the embedding says, which repeats here."""
    model = stream(folder, 4)
    same = [row[:8] * 8 for row in pieces(model, 1)] * 20
    _, facts = learn(model, same, progress=False)
    model.flash.close()
    assert min(facts["precision"]) >= PRECISION
    assert min(facts["recall"]) > 0.9


@pytest.mark.parametrize("slots", [1, 3, 5, 7])
@pytest.mark.parametrize("look_ahead", [None, True, False])
def test_results_are_the_same(slots, look_ahead, folder, learned):
    hidden = learned_path(folder).rename(learned_path(folder).with_suffix(".away"))
    plain = stream(folder, slots)
    assert isinstance(plain.flash.layers[0].slots.cache.policy, Lrfu)
    expected = run(plain, 2)
    plain.flash.close()
    hidden.rename(learned_path(folder))
    model = stream(folder, slots, look_ahead=look_ahead)
    assert isinstance(model.flash.layers[0].slots.cache.policy, Foreseen)
    actual = run(model, 2)
    assert_same(actual, expected)
    if look_ahead is not True:
        assert model.flash.stats.early == 0
    elif slots in (3, 5):  # of one slot no half can be given to a guess
        assert model.flash.stats.early > 0
    model.flash.close()


def test_it_counts_in_the_budget(learned):
    folder, _ = learned
    with_it = stream(folder, 3)
    more = with_it.flash.pool._footprint.fixed_bytes
    with_it.flash.close()
    learned_path(folder).unlink()
    without = stream(folder, 3)
    assert more - without.flash.pool._footprint.fixed_bytes > 0
    without.flash.close()


def test_nobody_uses_it_who_asks_for_neither(learned):
    folder, _ = learned
    model = stream(folder, 3, policy="lru", look_ahead=False)
    assert model.flash.layers[0].foresight is None
    model.flash.close()


def test_another_model_s_is_not_taken(learned, tmp_path):
    folder, manifest = learned
    path = learned_path(folder)
    arrays, facts = mx.load(str(path), return_metadata=True)
    mx.save_safetensors(str(path), arrays, facts | {"model": "another"})
    assert find_foresight(folder, manifest) is None


def test_a_damaged_file_is_named(learned):
    folder, manifest = learned
    path = learned_path(folder)
    arrays, facts = mx.load(str(path), return_metadata=True)
    first = next(iter(arrays))
    mx.save_safetensors(str(path), {first: arrays[first]}, facts)
    with pytest.raises(FlashError, match=r"cannot be read .* learn it again"):
        stream(folder, 3)
    path.write_bytes(b"no tensors")
    assert find_foresight(folder, manifest) is None


def test_nothing_half_written_is_left(learned, monkeypatch):
    folder, manifest = learned
    path = learned_path(folder)
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(foresight_file.mx, "save_safetensors", fail)
    with pytest.raises(FlashError, match="disk is full"):
        write_foresight(
            path, manifest, [Foresight(64, 8, 8), Foresight(64, 8, None)], {}
        )
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_too_little_text_is_refused(folder):
    model = stream(folder, 4)
    with pytest.raises(FlashError, match="too few to learn from"):
        learn(model, pieces(model, 2), progress=False)
    assert all(layer._watcher is None for layer in model.flash.layers)
    model.flash.close()


def test_scores_are_those_of_the_maps():
    one = Foresight(64, 6, 5)
    x = mx.random.normal((3, 64))
    keep = mx.dequantize(one.keep.weight, one.keep.scales, one.keep.biases, 64, 4)
    expected = x[-1] @ keep.T + one.keep.bias
    np.testing.assert_allclose(one.expected(x), expected, rtol=1e-4, atol=1e-5)
    assert one.next_scores(x).shape == (3, 5)
