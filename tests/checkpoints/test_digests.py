"""Altered files of a model are an error that names them, and never other text."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import stock_checkpoints as moe
from click.testing import CliRunner
from conftest import save_tokenizer, write_checkpoint
from mlx.utils import tree_flatten

import mlx_flash
from mlx_flash.checkpoints.digests import hub_digests
from mlx_flash.checkpoints.record import record_path
from mlx_flash.cli import main
from mlx_flash.converters.convert import convert
from mlx_flash.errors import FlashError
from mlx_flash.inspection import record, verify
from mlx_flash.loading import load_model
from mlx_flash.storage.manifest_reading import read_manifest

WEIGHTS = [
    "resident.safetensors",
    "ffn/layer_00.safetensors",
    "ffn/layer_01.safetensors",
]
SIDE = ["config.json", "tokenizer.json", "tokenizer_config.json"]
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


@pytest.fixture(autouse=True)
def records(tmp_path, monkeypatch):
    """An empty cache folder of mlx-flash."""
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "records"))
    return tmp_path / "records"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    base = tmp_path_factory.mktemp("sound")
    # Layers of more than 128 KiB, so that a sample leaves bytes out.
    source = write_checkpoint(base / "model", ffn_dim=2048)
    save_tokenizer(source)
    return convert(source, base / "flash", rank=0, unit="neuron", progress=False)


@pytest.fixture
def flash(sound, tmp_path):
    """A converted folder that a test may alter."""
    return Path(shutil.copytree(sound, tmp_path / "flash"))


@pytest.fixture(scope="module")
def sound_experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "experts"
    weights = dict(tree_flatten(moe.make_weights(moe.QWEN3).parameters()))
    names = sorted(weights)
    half = len(names) // 2
    shards = [{n: weights[n] for n in part} for part in (names[:half], names[half:])]
    moe.save(folder, moe.QWEN3, *shards)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def experts(sound_experts, tmp_path):
    """A stock checkpoint with experts in two shards that a test may alter."""
    return Path(shutil.copytree(sound_experts, tmp_path / "experts"))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip(path, offset):
    """Change one bit; size and everything else stay."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def loads(folder, **options):
    model, _ = load_model(folder, "1GB", **options)
    model.flash.close()


def refusal(folder, **options):
    with pytest.raises(FlashError) as error:
        loads(folder, **options)
    return str(error.value)


def between_pieces(path):
    """An offset that no sample looks at."""
    return path.stat().st_size // 7 + 20_000


def run(*args, code=0):
    result = CliRunner().invoke(main, list(map(str, args)))
    assert result.exit_code == code, result.output
    return result


# Converted folders


def test_the_manifest_has_digests_of_configuration_and_tokenizer(flash):
    noted = {entry.file: entry.sha256 for entry in read_manifest(flash).side_files}
    assert noted == {name: sha256(flash / name) for name in SIDE}


def test_an_altered_value_that_no_size_depends_on_is_refused(flash):
    edit(flash / "config.json", num_attention_heads=1)
    message = refusal(flash)
    assert message.startswith(f"config.json in {flash} differs from what was noted.")
    assert f"mlx-flash verify --record {flash}" in message
    assert "config.json" in refusal(flash, check="full")
    loads(flash, check="none")


def test_a_tokenizer_with_two_words_exchanged_is_refused(flash):
    file = flash / "tokenizer.json"
    text = file.read_text()
    text = text.replace('"w5"', '"?"').replace('"w6"', '"w5"').replace('"?"', '"w6"')
    file.write_text(text)
    with pytest.raises(FlashError, match="^tokenizer.json in .* differs from"):
        mlx_flash.load(flash, "1GB")
    with pytest.raises(FlashError, match="^tokenizer.json in .* differs from"):
        verify(flash, lambda name: None)
    with mlx_flash.load(flash, "1GB", check="none") as (_, tokenizer):
        assert tokenizer.encode("w5") == [6]


def test_a_file_that_is_gone_is_said_to_be_missing(flash):
    (flash / "tokenizer_config.json").unlink()
    assert "tokenizer_config.json (missing) in" in refusal(flash)


def test_a_change_that_is_meant_is_accepted(flash):
    edit(flash / "tokenizer_config.json", chat_template="{{ messages }}")
    (flash / "chat_template.jinja").write_text("{{ messages }}")
    (flash / "tokenizer.json").write_text((flash / "tokenizer.json").read_text() + " ")
    refusal(flash)
    before = json.loads((flash / "flash.json").read_text())
    (flash / "flash.json").write_text(json.dumps(before | {"note": "of a later 1.x"}))
    noted = []
    record(flash, noted.append)
    assert noted == ["chat_template.jinja", *SIDE]
    loads(flash, check="full")
    after = json.loads((flash / "flash.json").read_text())
    assert [entry["file"] for entry in after.pop("side_files")] == noted
    before.pop("side_files")
    assert after == before | {"note": "of a later 1.x"}
    assert not list(flash.glob("*.part"))


def test_weights_of_a_converted_folder_are_never_recorded_anew(flash):
    flip(flash / WEIGHTS[1], -9)
    record(flash, lambda name: None)
    with pytest.raises(FlashError, match=f"{WEIGHTS[1]} in .* what was converted"):
        verify(flash, lambda name: None)


def test_both_kinds_of_files_are_named_in_one_line(flash):
    edit(flash / "config.json", num_attention_heads=1)
    flip(flash / WEIGHTS[0], -9)
    result = run("verify", flash, code=1)
    assert result.stderr.count("\n") == 1
    assert f"{WEIGHTS[0]} in {flash} differs from what was converted." in result.stderr
    assert f"config.json in {flash} differs from what was noted." in result.stderr
    passed = [*WEIGHTS[1:], *SIDE[1:]]
    assert result.stdout.splitlines() == [f"ok  {name}" for name in passed]


def test_a_folder_from_before_loads_and_says_what_it_lacks(flash):
    old = json.loads((flash / "flash.json").read_text())
    del old["side_files"], old["resident"]["sample"]
    for layer in old["layers"]:
        del layer["sample"]
    (flash / "flash.json").write_text(json.dumps(old))
    edit(flash / "config.json", num_attention_heads=1)
    loads(flash)
    passed = []
    assert verify(flash, passed.append) == SIDE and passed == WEIGHTS
    assert "no digest to compare with" in refusal(flash, check="full")
    record(flash, lambda name: None)
    loads(flash, check="full")


def test_a_file_nobody_noted_is_told_by_verify(flash):
    (flash / "notes.txt").write_text("mine")
    loads(flash)
    assert run("verify", flash).stdout.splitlines()[-1] == "no digest  notes.txt"


@pytest.mark.parametrize("name", ["../outside.json", "/dev/zero", WEIGHTS[0], "\0", ""])
def test_a_manifest_cannot_have_other_files_read(flash, name):
    shutil.copy(flash / "config.json", flash.parent / "outside.json")
    manifest = json.loads((flash / "flash.json").read_text())
    digest = manifest["side_files"][0]["sha256"]
    manifest["side_files"].append({"file": name, "sha256": digest})
    (flash / "flash.json").write_text(json.dumps(manifest))
    assert "differs from what was noted" in refusal(flash)


# Samples of the weights


def test_layers_of_one_shape_cannot_be_exchanged(flash):
    first, second = (flash / name for name in WEIGHTS[1:])
    first.rename(flash / "third")
    second.rename(first)
    (flash / "third").rename(second)
    message = refusal(flash)
    assert f"{WEIGHTS[1]}, {WEIGHTS[2]} in {flash} differ from what was conv" in message
    loads(flash, check="none")


def test_a_file_whose_end_never_came_is_noticed(flash):
    path = flash / WEIGHTS[2]
    data = path.read_bytes()
    path.write_bytes(data[:-4096] + bytes(4096))
    assert WEIGHTS[2] in refusal(flash)


def test_one_bit_between_the_pieces_is_found_by_full_alone(flash):
    path = flash / WEIGHTS[1]
    flip(path, between_pieces(path))
    loads(flash)
    assert WEIGHTS[1] in refusal(flash, check="full")


def test_an_unknown_check_is_refused(flash):
    message = refusal(flash, check="some")
    assert "No check is called 'some'. Try none, sample or full." == message


@pytest.mark.parametrize("command", ["generate", "trace"])
def test_commands_check_as_they_are_told(flash, tmp_path, command):
    edit(flash / "config.json", num_attention_heads=1)
    words = [command, "w5 w6", "--model", flash, "--memory", "70%", "-m", 2]
    if command == "trace":
        words += ["-o", tmp_path / "trace.npz"]
    assert "config.json" in run(*words, code=1).stderr
    assert "config.json" in run(*words, "--check", "full", code=1).stderr
    run(*words, "--check", "none")


def test_the_server_is_told_to_check(flash, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "mlx_flash.server.serve", lambda *_, check, **__: asked.append(check)
    )
    run("serve", "--model", flash, "--check", "full", "--port", 1)
    run("serve", "--model", flash)
    assert asked == ["full", "sample"]


# Checkpoints that are read in place


def test_a_record_is_kept_outside_of_the_checkpoint(experts, records):
    before = {path: path.stat().st_mtime_ns for path in experts.iterdir()}
    result = run("verify", "--record", experts)
    index = "model.safetensors.index.json"
    files = [*SHARDS, "config.json", index, *SIDE[1:]]
    assert result.stdout.splitlines() == [f"noted  {name}" for name in files]
    assert before == {path: path.stat().st_mtime_ns for path in experts.iterdir()}
    assert record_path(experts).parent.parent == records
    assert json.loads(record_path(experts).read_text())["folder"] == str(experts)
    result = run("verify", experts)
    assert result.stdout.splitlines() == [f"ok  {name}" for name in files]


def test_without_a_record_there_is_nothing_to_compare_with(experts):
    assert (
        f"mlx-flash verify --record {experts}" in run("verify", experts, code=1).stderr
    )
    loads(experts)
    message = refusal(experts, check="full")
    assert SHARDS[0] in message and f"mlx-flash verify --record {experts}" in message


def test_altered_files_of_a_recorded_checkpoint_are_refused(experts):
    record(experts, lambda name: None)
    loads(experts, check="full")
    edit(experts / "config.json", rope_theta=2e4)
    assert "config.json in" in refusal(experts)
    edit(experts / "config.json", rope_theta=1e4)
    flip(experts / SHARDS[1], between_pieces(experts / SHARDS[1]))
    flip(experts / SHARDS[0], -1)
    message = refusal(experts)
    assert SHARDS[0] in message and SHARDS[1] not in message
    with pytest.raises(FlashError, match=f"{SHARDS[0]}, {SHARDS[1]} in .* differ"):
        verify(experts, lambda name: None)
    record(experts, lambda name: None)
    verify(experts, lambda name: None)


def test_a_record_belongs_to_the_folder_a_link_leads_to(experts, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(experts)
    record(link, lambda name: None)
    edit(experts / "config.json", rope_theta=2e4)
    assert "config.json in" in refusal(experts) and "config.json in" in refusal(link)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"record_version": 2}', "cut"])
def test_a_damaged_record_is_made_anew(experts, text):
    record(experts, lambda name: None)
    path = record_path(experts)
    path.write_text(path.read_text()[:-40] if text == "cut" else text)
    message = refusal(experts)
    assert str(path) in message
    assert f"Make it anew: mlx-flash verify --record {experts}" in message
    record(experts, lambda name: None)
    loads(experts)


def test_a_record_that_cannot_be_written_leaves_the_old_one(experts, monkeypatch):
    record(experts, lambda name: None)
    before = record_path(experts).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FlashError, match="The disk is full"):
        record(experts, lambda name: None)
    assert record_path(experts).read_bytes() == before
    assert list(record_path(experts).parent.iterdir()) == [record_path(experts)]


def test_a_dense_checkpoint_is_verified_like_others(tmp_path):
    source = write_checkpoint(tmp_path / "model")
    message = run("verify", source, code=1).stderr
    assert re.search("no digests to compare with.*verify --record", message)
    assert "noted  model.safetensors" in run("verify", source, "--record").stdout
    assert "ok  model.safetensors" in run("verify", source).stdout


# The hub's cache


@pytest.fixture
def snapshot(experts, tmp_path):
    """A checkpoint as the hub's cache has it: the shards by SHA-256, others not."""
    folder = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--a--b" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for path in experts.iterdir():
        data = path.read_bytes()
        large = path.name in SHARDS or path.name == "tokenizer.json"
        digest = hashlib.sha256 if large else hashlib.sha1
        blob = blobs / digest(data).hexdigest()
        blob.write_bytes(data)
        (folder / path.name).symlink_to(Path("../../blobs") / blob.name)
    return folder


def test_the_hub_names_large_files_by_their_digest(snapshot):
    assert sorted(hub_digests(snapshot)) == sorted([*SHARDS, "tokenizer.json"])
    lines = run("verify", snapshot).stdout.splitlines()
    assert lines[:3] == [f"ok  {name}" for name in [*SHARDS, "tokenizer.json"]]
    others = ["config.json", "model.safetensors.index.json", "tokenizer_config.json"]
    assert lines[3:] == [f"no digest  {name}" for name in others]


def test_a_damaged_download_is_refused_and_never_recorded(snapshot):
    flip((snapshot / SHARDS[0]).resolve(), -1)
    for words in (["verify", snapshot], ["verify", "--record", snapshot]):
        message = run(*words, code=1).stderr
        assert f"{SHARDS[0]} in {snapshot} differs from the hub's file" in message
        assert "--force-download" in message
    assert not record_path(snapshot).exists()
    loads(snapshot)  # nobody noted a sample of it
    flip((snapshot / SHARDS[0]).resolve(), -1)
    tokenizer = (snapshot / "tokenizer.json").resolve()
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert "tokenizer.json in" in refusal(snapshot)


def test_a_record_of_a_download_covers_all_files(snapshot):
    record(snapshot, lambda name: None)
    assert verify(snapshot, lambda name: None) == []
    loads(snapshot, check="full")
