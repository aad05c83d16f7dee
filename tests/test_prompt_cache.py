"""KV caches on disk: the same answer as without, or one line that says why not."""

import stat
from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import save_tokenizer
from mlx_lm.models.cache import make_prompt_cache
from stock_checkpoints import NEMOTRON, QWEN3, write_checkpoint

import mlx_flash
from mlx_flash import prompt_cache
from mlx_flash.errors import FlashError
from mlx_flash.prompt_cache import (
    common_tokens,
    load_prompt_cache,
    model_identity,
    read_saved_prompt,
    save_prompt_cache,
)

TOKENS = [3 + i % 90 for i in range(100)]
MORE = [5, 9, 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = write_checkpoint(tmp_path_factory.mktemp("model") / "experts", QWEN3)
    save_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def model(folder):
    with mlx_flash.load_model(folder, "1GB") as (model, _):
        yield model


@pytest.fixture(scope="module")
def identity(model):
    return model_identity(model.flash)


@pytest.fixture
def saved(model, identity, tmp_path):
    """A file with TOKENS, in a folder of its own."""
    path = tmp_path / "kept.safetensors"
    cache = make_prompt_cache(model)
    model(mx.array([TOKENS]), cache=cache)
    save_prompt_cache(path, cache, TOKENS, identity)
    assert list(tmp_path.iterdir()) == [path]
    return path


def test_what_was_saved_goes_on_as_if_it_had_been_read(model, identity, saved):
    cache = make_prompt_cache(model)
    expected = model(mx.array([TOKENS]), cache=cache)
    expected = model(mx.array([MORE]), cache=cache)
    found = read_saved_prompt(saved)
    assert list(found.tokens) == TOKENS and found.can_trim
    assert found.file_bytes == saved.stat().st_size
    loaded = load_prompt_cache(found, model, identity)
    assert mx.array_equal(model(mx.array([MORE]), cache=loaded), expected)


def test_a_cache_without_offsets_is_saved_too(tmp_path):
    """Of a state space; it cannot be cut back."""
    folder = write_checkpoint(tmp_path / "model", NEMOTRON)
    with mlx_flash.load_model(folder, "1GB") as (model, _):
        cache = make_prompt_cache(model)
        model(mx.array([TOKENS]), cache=cache)
        path = tmp_path / "kept.safetensors"
        identity = model_identity(model.flash)
        save_prompt_cache(path, cache, TOKENS, identity)
        found = read_saved_prompt(path)
        assert not found.can_trim
        loaded = load_prompt_cache(found, model, identity)
        expected = model(mx.array([MORE]), cache=cache)
        assert mx.array_equal(model(mx.array([MORE]), cache=loaded), expected)


def test_only_the_owner_may_read_it(saved):
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9, 0.999])
def test_one_altered_byte_is_noticed(model, identity, saved, share):
    raw = bytearray(saved.read_bytes())
    raw[int(share * len(raw))] ^= 4
    saved.write_bytes(raw)
    with pytest.raises(FlashError, match=str(saved)):
        load_prompt_cache(read_saved_prompt(saved), model, identity)


@pytest.mark.parametrize("end", [0, 7, 100, -1])
def test_a_file_that_was_cut_is_refused(saved, end):
    saved.write_bytes(saved.read_bytes()[:end])
    with pytest.raises(FlashError, match=str(saved)):
        read_saved_prompt(saved)


def test_a_foreign_file_is_refused(model, identity, tmp_path):
    path = tmp_path / "foreign.safetensors"
    mx.save_safetensors(str(path), {"x": mx.zeros(4)}, {"0.version": "another"})
    with pytest.raises(FlashError, match="no prompt cache"):
        read_saved_prompt(path)
    with pytest.raises(FlashError, match="missing"):
        read_saved_prompt(tmp_path / "missing.safetensors")


def test_a_cache_of_another_shape_is_refused(model, identity, tmp_path):
    """Whoever wrote it gave it a right digest."""
    path = tmp_path / "kept.safetensors"
    cache = make_prompt_cache(model)
    model(mx.array([TOKENS]), cache=cache)
    save_prompt_cache(path, cache[:1], TOKENS, identity)
    with pytest.raises(FlashError, match="1 caches"):
        load_prompt_cache(read_saved_prompt(path), model, identity)
    save_prompt_cache(path, cache, TOKENS[:-1], identity)
    with pytest.raises(FlashError, match="number of tokens"):
        load_prompt_cache(read_saved_prompt(path), model, identity)


def test_it_belongs_to_the_model_and_its_settings(model, folder, saved, monkeypatch):
    found = read_saved_prompt(saved)
    before = model_identity(model.flash)
    others = {model_identity(model.flash, kv_bits=8)}
    with monkeypatch.context() as patch:
        patch.setattr(prompt_cache.mlx_lm, "__version__", "0.0")
        others.add(model_identity(model.flash))
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace("rope_theta", "rope_thetas"))
    others.add(model_identity(model.flash))
    config.write_text(text)
    assert before not in others and len(others) == 3
    assert model_identity(model.flash) == before
    for identity in others:
        with pytest.raises(FlashError, match="another model"):
            load_prompt_cache(found, model, identity)


def test_weights_belong_to_the_identity(model, tmp_path):
    """Also those that nobody noted digests of."""
    seen = set()
    for seed in (1, 2):
        folder = write_checkpoint(tmp_path / str(seed), QWEN3, seed=seed)
        with mlx_flash.load_model(folder, "1GB") as (other, _):
            seen.add(model_identity(other.flash))
    assert len(seen) == 2


def test_a_converted_model_is_known_by_its_manifest(flash_folder):
    with mlx_flash.load_model(flash_folder, "1GB") as (one, _):
        known = model_identity(one.flash)
        assert known == model_identity(one.flash)
    with mlx_flash.load_model(flash_folder, "1GB", predictor=False) as (other, _):
        assert model_identity(other.flash) != known


def test_a_write_that_fails_leaves_what_was_there(model, saved, monkeypatch):
    before = saved.read_bytes()

    def save(name, *_):
        open(name, "wb").close()
        raise RuntimeError("[write] Unable to write 7 bytes to file.")

    monkeypatch.setattr(prompt_cache.mlx_cache, "save_prompt_cache", save)
    with pytest.raises(FlashError, match="could not be written"):
        save_prompt_cache(saved, make_prompt_cache(model), TOKENS, "x")
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_another_suffix_is_refused(model, tmp_path):
    with pytest.raises(FlashError, match=r"\.safetensors"):
        save_prompt_cache(tmp_path / "kept.npz", make_prompt_cache(model), TOKENS, "x")


def test_a_file_that_changes_between_digest_and_load(
    model, identity, saved, monkeypatch
):
    found = read_saved_prompt(saved)
    load = prompt_cache.mlx_cache.load_prompt_cache

    def other(name, **options):
        cache, facts = load(name, **options)
        return cache, facts | {"sha256": "f" * 64}

    monkeypatch.setattr(prompt_cache.mlx_cache, "load_prompt_cache", other)
    with pytest.raises(FlashError, match="changed"):
        load_prompt_cache(found, model, identity)
    with pytest.raises(FlashError, match="digest"):
        load_prompt_cache(replace(found, sha256="f" * 64), model, identity)


def test_common_tokens():
    assert common_tokens([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_tokens([1, 2], [1, 2, 4]) == 2
    assert common_tokens([], [1]) == common_tokens([2], [1]) == 0
