"""`--prompt-cache-dir`: prefixes come back, others are never trusted."""

import os

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from stock_checkpoints import QWEN3, write_checkpoint

import mlx_flash
from mlx_flash.errors import FlashError
from mlx_flash.server.conversations import Conversations, cache_bytes
from mlx_flash.server.prefix_folder import LEAST_NEW, PrefixFolder, Saving

MANY = 10**8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "experts", QWEN3)
    with mlx_flash.load_model(folder, "1GB", context=1024) as (model, _):
        yield model


def tokens_of(i, length=300):
    return [3 + i] + [3 + (7 * k + i) % 90 for k in range(length - 1)]


def save(model, folder, tokens):
    cache = make_prompt_cache(model)
    model(mx.array([tokens]), cache=cache)
    folder.save(tokens, cache, cache_bytes(cache))


def files(path):
    return sorted(path.iterdir())


def total(path):
    return sum(x.stat().st_size for x in files(path))


def test_a_restarted_server_reads_only_what_is_new(model, tmp_path):
    saving = Saving(tmp_path / "kept", MANY)
    tokens = tokens_of(0)
    save(model, PrefixFolder(saving, model), tokens)
    conversations = Conversations(model, PrefixFolder(saving, model))
    cache, count = conversations.begin(tokens + [5, 6])
    assert count == len(tokens)
    logits = model(mx.array([[5, 6]]), cache=cache)
    whole = model(mx.array([tokens + [5, 6]]), cache=make_prompt_cache(model))
    assert mx.allclose(logits[:, -1], whole[:, -1], rtol=1e-4, atol=1e-5)


def test_a_part_of_a_file_is_cut_out(model, tmp_path):
    folder = PrefixFolder(Saving(tmp_path, MANY), model)
    save(model, folder, tokens_of(0))
    conversations = Conversations(model, folder)
    other = tokens_of(0)[:200] + [5] * 30
    cache, count = conversations.begin(other)
    assert count == 200
    logits = model(mx.array([other[200:]]), cache=cache)
    whole = model(mx.array([other]), cache=make_prompt_cache(model))
    assert mx.allclose(logits[:, -1], whole[:, -1], rtol=1e-4, atol=1e-5)


def test_memory_comes_before_disk(model, tmp_path, monkeypatch):
    folder = PrefixFolder(Saving(tmp_path, MANY), model)
    conversations = Conversations(model, folder)
    tokens = tokens_of(0)
    cache, _ = conversations.begin(tokens)
    model(mx.array([tokens]), cache=cache)
    conversations.keep(tokens, cache)
    conversations.save()
    assert len(files(tmp_path)) == 1
    monkeypatch.setattr(folder, "load", lambda saved: pytest.fail("it was read"))
    assert conversations.begin(tokens + [5])[1] == len(tokens)


@pytest.mark.slow
def test_a_conversation_is_written_when_it_has_grown(model, tmp_path):
    """And it replaces what it grew from: one file, whatever the number of turns."""
    folder = PrefixFolder(Saving(tmp_path, MANY), model)
    save(model, folder, tokens_of(0, LEAST_NEW - 1))
    assert not files(tmp_path)
    written = set()
    for length in range(300, 1000, 20):
        save(model, folder, tokens_of(0, length))
        written |= set(files(tmp_path))
        assert len(files(tmp_path)) == 1
    assert len(written) == 3  # at 300, 560 and 820 tokens


def test_what_was_used_longest_ago_goes(model, tmp_path):
    folder = PrefixFolder(Saving(tmp_path, MANY), model)
    save(model, folder, tokens_of(0))
    one = total(tmp_path)
    folder = PrefixFolder(Saving(tmp_path, int(2.5 * one)), model)
    save(model, folder, tokens_of(1))
    first, second = (folder.longest(tokens_of(i), MANY)[0].path for i in (0, 1))
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    assert folder.load(folder.longest(tokens_of(0), MANY)[0])  # now it was used
    save(model, folder, tokens_of(2))
    assert first.exists() and not second.exists()
    assert total(tmp_path) <= 2.5 * one


def test_what_is_too_large_is_not_written(model, tmp_path):
    folder = PrefixFolder(Saving(tmp_path, 10_000), model)
    save(model, folder, tokens_of(0))
    assert not files(tmp_path)


def test_foreign_files_are_left_alone(model, tmp_path, capsys):
    foreign = tmp_path / "prefix-0.safetensors"
    mx.save_safetensors(str(foreign), {"x": mx.zeros(100_000)})
    junk = tmp_path / "prefix-1.safetensors"
    junk.write_bytes(b"junk")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "prefix-2.safetensors").mkdir()
    folder = PrefixFolder(Saving(tmp_path, 1_000_000), model)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"Ignored: {tmp_path}/prefix-") for line in lines)
    for i in range(4):
        save(model, folder, tokens_of(i))
    left = {x.name for x in files(tmp_path)}
    assert left >= {foreign.name, junk.name, "notes.txt", "prefix-2.safetensors"}
    assert len(left) > 4
    assert not capsys.readouterr().err


def test_a_damaged_file_is_named_once_and_read_again_from_the_model(
    model, tmp_path, capsys
):
    folder = PrefixFolder(Saving(tmp_path, MANY), model)
    save(model, folder, tokens_of(0))
    [path] = files(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    conversations = Conversations(model, PrefixFolder(Saving(tmp_path, MANY), model))
    assert not capsys.readouterr().err
    for _ in range(2):
        cache, count = conversations.begin(tokens_of(0))
        assert count == 0
    [line] = capsys.readouterr().err.splitlines()
    assert str(path) in line and "damaged" in line
    model(mx.array([tokens_of(0)]), cache=cache)
    conversations.keep(tokens_of(0), cache)
    conversations.save()  # whole again
    assert Conversations(model, PrefixFolder(Saving(tmp_path, MANY), model)).begin(
        tokens_of(0) + [5]
    )[1] == len(tokens_of(0))


def test_a_damaged_file_does_not_cost_what_memory_has(model, tmp_path, capsys):
    """Room was made for the file before it was found to be damaged."""
    folder = PrefixFolder(Saving(tmp_path, MANY), model)
    save(model, folder, tokens_of(0, 900))
    [path] = files(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    conversations = Conversations(model, folder)
    tokens = tokens_of(0, 300)
    cache, _ = conversations.begin(tokens, anew=True)
    model(mx.array([tokens]), cache=cache)
    conversations.keep(tokens, cache)
    assert conversations.begin(tokens_of(0, 900))[1] in (0, 300)
    assert "damaged" in capsys.readouterr().err


def test_files_of_another_model_are_ignored(model, tmp_path, capsys):
    saving = Saving(tmp_path / "kept", MANY)
    other = write_checkpoint(tmp_path / "other", QWEN3, seed=2)
    with mlx_flash.load_model(other, "1GB") as (stranger, _):
        folder = PrefixFolder(saving, stranger)
        for i in (0, 1):
            save(stranger, folder, tokens_of(i))
    assert not capsys.readouterr().err
    folder = PrefixFolder(saving, model)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("2 prompt caches") and "another model" in line
    assert folder.longest(tokens_of(0), MANY) == (None, 0)
    folder = PrefixFolder(saving, model, kv_bits=8)
    save(model, folder, tokens_of(0))
    assert len(files(saving.folder)) == 3


def test_a_file_that_somebody_deleted_is_no_trouble(model, tmp_path, capsys):
    folder = PrefixFolder(Saving(tmp_path, MANY), model)
    save(model, folder, tokens_of(0))
    files(tmp_path)[0].unlink()
    assert Conversations(model, folder).begin(tokens_of(0))[1] == 0
    assert len(capsys.readouterr().err.splitlines()) == 1
    save(model, folder, tokens_of(0))
    assert len(files(tmp_path)) == 1


def test_a_write_that_fails_is_one_line(model, tmp_path, capsys):
    kept = tmp_path / "kept"
    folder = PrefixFolder(Saving(kept, MANY), model)
    kept.rmdir()
    kept.write_text("no folder")
    save(model, folder, tokens_of(0))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("A prompt cache was not saved") and str(kept) in line


def test_a_folder_that_cannot_be_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FlashError, match="--prompt-cache-dir"):
        PrefixFolder(Saving(tmp_path / "file" / "kept", MANY), model)


def test_what_a_killed_server_left_unfinished_goes(model, tmp_path):
    old = tmp_path / ".prefix-0.1.part.safetensors"
    new = tmp_path / ".prefix-1.1.part.safetensors"
    for part in (old, new):
        part.write_text("")
    os.utime(old, (1, 1))
    PrefixFolder(Saving(tmp_path, MANY), model)
    assert files(tmp_path) == [new]
