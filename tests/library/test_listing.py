"""`mlx-flash list` and `rm`."""

import json

import pytest
from click.testing import CliRunner
from fake_hub import NAME
from opt_checkpoints import files_of
from stock_checkpoints import LLAMA, QWEN3, write_checkpoint

import mlx_flash
from mlx_flash.checkpoints.hub import find_model
from mlx_flash.checkpoints.shelf import all_shelved, shelf, shelved
from mlx_flash.cli import main
from mlx_flash.converters.lock import Lock
from mlx_flash.library.listing import on_disk, size_of
from mlx_flash.library.opening import runnable


def run(*args, code=0, **options):
    result = CliRunner().invoke(main, [str(arg) for arg in args], **options)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "dense", LLAMA)


@pytest.fixture
def place(source, cache):
    runnable(source, lambda offer: True, progress=False)
    return shelved(source)


def test_nothing_is_said_to_be_nothing(cache):
    result = run("list")
    assert result.stdout == "" and f"nothing in {shelf()}" in result.stderr
    assert run("list", "--json").stdout == "[]\n"


def test_what_lies_on_disk(hub, place, source, tmp_path):
    hub.files = files_of(write_checkpoint(tmp_path / "experts", QWEN3))
    find_model(NAME, checkpoint=True)
    shelved("other").partial.mkdir()
    found = {model.name: model for model in on_disk()}
    assert list(found) == [place.name, "other", NAME]
    assert found[place.name].kind == f"blocks, of {source}"
    assert found[place.name].nbytes == size_of(place.folder)
    assert found["other"].kind == "conversion interrupted"
    assert (found[NAME].kind, found[NAME].place) == (
        "experts, read in place",
        "hub cache",
    )
    assert found[NAME].nbytes == sum(map(len, hub.files.values()))
    text = run("list").stdout  # Markdown, as it does not go to a terminal
    assert text.startswith("| model | kind | where | size |\n|---|---|---|--:|\n")
    assert len(text.splitlines()) == 5
    assert len(json.loads(run("list", "--json").stdout)) == 3


def test_what_cannot_run_as_it_lies_is_not_listed(hub, tmp_path):
    hub.files = files_of(write_checkpoint(tmp_path / "model", LLAMA))
    find_model(NAME, checkpoint=True)
    assert on_disk() == []


def test_half_a_download_is_not_listed(hub, tmp_path):
    hub.files = files_of(write_checkpoint(tmp_path / "model", QWEN3))
    del hub.files["model.safetensors"]
    find_model(NAME, checkpoint=True)
    assert on_disk() == []


def test_rm_asks_and_deletes_only_the_conversion(place, source):
    result = run("rm", source, code=1)
    assert "would be deleted. Add --yes to agree." in result.stderr
    assert place.is_whole
    (shelf() / "other").mkdir()
    run("rm", source, "--yes")
    assert [path.name for path in shelf().iterdir()] == ["other"]
    assert (source / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["nothing", "a/b", "..", ".", "/", "../models"])
def test_rm_of_what_is_not_ours(place, name):
    message = run("rm", name, "-y", code=1).stderr
    assert f"{name} is not among the models in" in message
    assert place.is_whole


def test_rm_of_a_folder_that_no_conversion_made(cache):
    (shelf() / "mine").mkdir(parents=True)
    (shelf() / "mine" / "file").write_text("mine")
    assert "is not among the models" in run("rm", "mine", "-y", code=1).stderr
    assert (shelf() / "mine" / "file").exists()


def test_rm_of_what_is_in_use(place, source):
    with mlx_flash.load_model(source, "1GB"):
        message = run("rm", place.name, "-y", code=1).stderr
        assert "in use by a process" in message and place.is_whole
    run("rm", place.name, "-y")
    assert all_shelved() == []


def test_rm_of_what_is_being_converted(place):
    with Lock(place.folder):
        message = run("rm", place.name, "-y", code=1).stderr
    assert "Another conversion" in message and place.is_whole


def test_rm_of_half_a_conversion(cache):
    shelved("half").partial.mkdir(parents=True)
    run("rm", "half", "-y")
    assert list(shelf().iterdir()) == []
