"""Models by any name: what runs as it lies, and what is converted once."""

import json
import shutil

import fake_hub
import pytest
from click.testing import CliRunner
from fake_hub import COMMIT, NAME
from huggingface_hub import constants
from opt_checkpoints import files_of, save_tokenizer
from published import ELSEWHERE, write_published
from stock_checkpoints import LLAMA, QWEN3, write_checkpoint, write_original

import mlx_flash
from mlx_flash.checkpoints.hub import find_config, has_weights
from mlx_flash.checkpoints.shelf import all_shelved, shelf, shelved
from mlx_flash.cli import main
from mlx_flash.converters import conversion
from mlx_flash.errors import FlashError
from mlx_flash.library.opening import converted, runnable
from mlx_flash.storage.manifest_reading import read_manifest

NEXT = "f" * 40  # another commit
CONFIG = LLAMA | {"vocab_size": 2048}


@pytest.fixture
def dense(tmp_path):
    folder = write_checkpoint(tmp_path / "dense", CONFIG)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def asked():
    """Agrees to everything, and keeps what was asked."""
    offers = []

    class Asked(list):
        def __call__(self, offer):
            offers.append(offer)
            self.append(offer)
            return True

    return Asked()


def find(name, asked):
    return runnable(name, asked, progress=False)


def run(*args, code=0):
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


def refused(*args):
    result = run(*args, code=1)
    assert result.stdout == "" and result.stderr.count("\n") == 1, result.output
    return result.stderr


def change(folder):
    """Another model in the same folder."""
    write_checkpoint(folder, CONFIG, seed=2)


# What is converted, and when


def test_a_dense_checkpoint_is_converted_once(dense, asked):
    folder = find(dense, asked)
    assert folder.parent == shelf() and read_manifest(folder).unit == "block"
    (offer,) = asked
    assert offer.disk_bytes >= sum(f.stat().st_size for f in folder.rglob("*.saf*")) / 2
    assert str(offer.place.folder) in str(offer) and " GB of disk" in str(offer)
    before = (folder / "flash.json").stat().st_mtime_ns
    assert find(dense, asked) == find(str(dense), asked) == folder
    assert find(folder.name, asked) == find(folder, asked) == folder
    assert len(asked) == 1 and (folder / "flash.json").stat().st_mtime_ns == before


def test_what_runs_as_it_lies_is_not_converted(tmp_path, asked, flash_folder):
    experts = write_checkpoint(tmp_path / "experts", QWEN3)
    assert find(experts, asked) == experts
    assert find(flash_folder, asked) == flash_folder
    assert asked == [] and all_shelved() == []


def test_experts_that_are_stored_one_by_one_are_not_converted(tmp_path, asked):
    experts = write_original(tmp_path / "experts", QWEN3)
    assert find(experts, asked) == experts
    assert asked == [] and all_shelved() == []


def test_experts_that_lie_transposed_are_converted(tmp_path, asked):
    lay_out, _ = ELSEWHERE["qwen3_vl_moe"]
    experts = write_published(tmp_path / "experts", "qwen3_vl_moe", lay_out)
    folder = find(experts, asked)
    assert len(asked) == 1 and read_manifest(folder).unit == "expert"


def test_a_changed_source_is_converted_anew(dense, asked):
    folder = find(dense, asked)
    before = (folder / "flash.json").read_text()
    change(dense)
    assert converted(dense) is None
    assert find(dense, asked) == folder
    assert asked[1].changed and "changed since it was converted" in str(asked[1])
    assert (folder / "flash.json").read_text() != before
    find(dense, asked)
    assert len(asked) == 2


def test_a_source_that_is_gone_leaves_its_conversion(dense, asked):
    folder = find(dense, asked)
    (dense / "model.safetensors").unlink()
    assert find(dense, asked) == folder
    shutil.rmtree(dense)
    assert find(folder.name, asked) == folder
    assert len(asked) == 1


def test_an_interrupted_conversion_goes_on(dense, asked, monkeypatch):
    real, layers = conversion._write_layer, []

    def write(work, cutter, index):
        layers.append(index)
        if len(layers) == 2:
            raise KeyboardInterrupt
        return real(work, cutter, index)

    monkeypatch.setattr(conversion, "_write_layer", write)
    with pytest.raises(KeyboardInterrupt):
        find(dense, asked)
    assert [place.is_whole for place in all_shelved()] == [False]
    find(dense, asked)
    assert layers == [0, 1, 1]
    assert asked[1].begun and "was interrupted, and goes on" in str(asked[1])


def test_an_interrupted_conversion_of_what_changed_begins_anew(
    dense, asked, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_write_rest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            find(dense, asked)
    change(dense)
    find(dense, asked)
    assert asked[1].changed and not asked[1].begun


def test_a_conversion_that_fails_at_once_leaves_nothing(dense):
    assert "MLX has no" in refused("convert", dense, "--bits", 7)
    assert "would be ignored" in refused("convert", dense, "--recall", 0.9)
    assert list(shelf().iterdir()) == []


def test_whoever_does_not_agree_gets_nothing(dense):
    with pytest.raises(FlashError, match="was not converted"):
        runnable(dense, lambda offer: False)
    assert all_shelved() == []


def test_a_full_disk_is_seen_before_anything_is_asked(dense, asked, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FlashError, match="needs .* GB of disk, and .*MLX_FLASH_HOME"):
        find(dense, asked)
    assert asked == [] and all_shelved() == []


# The hub


def test_a_repository_whose_experts_prove_to_be_transposed(hub, tmp_path, asked):
    lay_out, _ = ELSEWHERE["qwen3_vl_moe"]
    folder = write_published(tmp_path / "experts", "qwen3_vl_moe", lay_out)
    save_tokenizer(folder)
    hub.files = files_of(folder)
    found = find(NAME, asked)
    assert found.parent == shelf() and read_manifest(found).unit == "expert"
    (offer,) = asked
    assert has_weights(find_config(NAME)) and offer.disk_bytes > 0


def test_a_repository_whose_experts_lie_one_by_one(hub, tmp_path, asked):
    folder = write_original(tmp_path / "experts", QWEN3)
    hub.files = files_of(folder)
    assert find(NAME, asked).name == COMMIT and asked == []


def test_a_dense_repository(hub, dense, asked, monkeypatch):
    hub.files = files_of(dense)

    def look(offer):
        assert not has_weights(find_config(NAME))
        return asked(offer)

    folder = find(NAME, look)
    assert asked[0].download_bytes == len(hub.files["model.safetensors"])
    assert "after a download of" in str(asked[0])
    manifest = read_manifest(folder)
    assert (manifest.source, manifest.revision) == (NAME, COMMIT)
    assert find(NAME, asked) == folder and folder.name == "tiny--opt"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find(NAME, asked) == folder
    assert len(asked) == 1


def test_a_commit_that_changes_no_weights_makes_no_conversion(
    hub, dense, asked, monkeypatch
):
    hub.files = files_of(dense)
    folder = find(NAME, asked)
    hub.files["README.md"] = b"words"
    monkeypatch.setattr(fake_hub, "COMMIT", NEXT)
    assert find(NAME, asked) == folder and len(asked) == 1
    change(dense)
    hub.files = files_of(dense)
    monkeypatch.setattr(fake_hub, "COMMIT", "e" * 40)
    assert find(NAME, asked) == folder
    assert len(asked) == 2 and asked[1].changed


# From the command line and from Python


def test_generate_asks_by_one_line_where_nobody_can_answer(dense):
    message = refused("generate", "w", "--model", dense)
    assert f"{dense} runs from flash once it is converted" in message
    assert "Add --yes" in message


@pytest.mark.parametrize("command", ["generate", "trace"])
def test_every_command_that_runs_takes_dense_checkpoints(dense, tmp_path, command):
    more = ["-o", tmp_path / "t.npz"] if command == "trace" else ["--memory", "1GB"]
    args = [command, "a b", "--model", dense, "--max-tokens", 2, *more]
    if command == "trace":  # of blocks, all are asked for
        assert "Add --yes" in run(*args, code=1).stderr
        return
    assert "runs from flash once" in run(*args, "--yes").stderr
    assert "once" not in run(*args).stderr
    (place,) = all_shelved()
    assert place.folder == shelved(dense).folder


def test_commands_that_look_take_them_before_and_after(dense, asked):
    for command in ("plan", "info"):
        assert run(command, dense, "--json").exit_code == 0
    assert json.loads(run("info", dense, "--json").stdout)["unit"] == "block"
    assert "to be converted" in run("info", dense).stdout
    folder = find(dense, asked)
    assert str(folder) in run("info", dense).stdout
    assert "flash folder" in run("plan", dense).stdout
    assert "ok  resident.safetensors" in run("verify", dense).stdout


def test_python_names_the_command_or_converts(dense):
    with pytest.raises(FlashError, match=f"mlx-flash convert {dense}"):
        mlx_flash.load(dense, "1GB")
    with mlx_flash.load(dense, "1GB", convert=True) as (model, _):
        assert model.flash.kind.name == "block"
    with mlx_flash.load(dense, "1GB") as (model, _):
        assert model.flash.folder.parent == shelf()
    with mlx_flash.load_model(dense, "1GB") as (model, _):
        assert model.flash.folder.parent == shelf()


def test_convert_without_a_folder_fills_the_shelf(dense):
    run("convert", dense, "-q", "--bits", 4, "--group-size", 32)
    folder = converted(dense)
    assert folder is not None and folder.parent == shelf()
    assert run("info", dense, "--json").stdout.count('"bits": 4') == 1
