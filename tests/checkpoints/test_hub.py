"""Finding models: local folders, and downloads from a hub that runs in this process."""

import json
import os
import time

import huggingface_hub
import pytest
from click.testing import CliRunner
from fake_hub import COMMIT, NAME, point_to
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors
from opt_checkpoints import files_of, make_checkpoint

import mlx_flash
from mlx_flash.checkpoints.hub import find_model
from mlx_flash.cli import main
from mlx_flash.converters.convert import convert
from mlx_flash.errors import FlashError


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "model")


def shut(hub, monkeypatch):
    """The hub is gone: nothing answers any more."""
    point_to("http://127.0.0.1:9", monkeypatch)


# Local folders


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model(tmp_path) == tmp_path
    assert str(find_model("owner/name")) == "owner/name"  # not asked of the hub
    monkeypatch.setenv("HOME", str(tmp_path / "owner"))
    assert find_model("~/name") == tmp_path / "owner" / "name"


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "./x/y", "/no/such", "a b/c", ""])
def test_what_is_neither_folder_nor_hub_name(name, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    if not name:  # Path("") is the current folder
        assert find_model(name).resolve() == tmp_path / "empty"
        return
    with pytest.raises(FlashError, match="does not exist.*hub name such as"):
        find_model(name)


def test_a_path_object_is_never_a_hub_name(cache):
    from pathlib import Path

    with pytest.raises(FlashError, match="tiny/opt does not exist"):
        find_model(Path(NAME))


# Downloads


def test_safetensors_are_downloaded_and_bin_is_left(hub, checkpoint, tmp_path):
    hub.files = files_of(checkpoint) | {
        "pytorch_model.bin": b"not wanted",
        "consolidated.safetensors": b"not wanted",
        "tf_model.h5": b"not wanted",
        "README.md": b"not wanted",
    }
    folder = find_model(NAME, checkpoint=True)
    assert files_of(folder) == files_of(checkpoint)
    assert sorted(hub.fetched) == sorted(files_of(checkpoint))
    flash = convert(NAME, tmp_path / "flash", rank=0, progress=False)
    manifest = json.loads((flash / "flash.json").read_text())
    assert (manifest["source"], manifest["revision"]) == (NAME, COMMIT)
    assert sorted(hub.fetched) == sorted(files_of(checkpoint))  # nothing twice


def test_shards_come_with_their_index(hub, tmp_path):
    src = make_checkpoint(tmp_path / "model", shards=3)
    hub.files = files_of(src)
    assert files_of(find_model(NAME, checkpoint=True)) == files_of(src)


def test_bin_is_downloaded_where_there_is_nothing_else(hub, checkpoint):
    files = files_of(checkpoint)
    del files["model.safetensors"]
    hub.files = files | {
        "pytorch_model-00001-of-00001.bin": b"weights",
        "pytorch_model.bin.index.json": b"{}",
        "flax_model.msgpack": b"not wanted",
    }
    found = files_of(find_model(NAME, checkpoint=True))
    del hub.files["flax_model.msgpack"]
    assert found == hub.files


def test_flash_folder_is_downloaded(hub, checkpoint, tmp_path):
    flash = convert(checkpoint, tmp_path / "flash", rank=0, progress=False)
    hub.files = files_of(flash) | {"model.safetensors": b"not wanted"}
    assert files_of(find_model(NAME)) == files_of(flash)
    result = CliRunner().invoke(main, ["info", NAME, "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["layers"] == 2
    result = CliRunner().invoke(main, ["verify", NAME])
    assert result.exit_code == 0 and result.stdout.count("ok  ") == 6
    result = CliRunner().invoke(main, ["generate", "a", "--model", NAME, "-m", "2"])
    assert result.exit_code == 0


def test_weights_of_a_plain_checkpoint_do_not_come_for_nothing(hub, checkpoint):
    hub.files = files_of(checkpoint)
    result = CliRunner().invoke(main, ["generate", "a", "--model", NAME])
    assert result.exit_code == 1 and result.stdout == ""
    message = result.stderr.splitlines()[-1]  # after the library's progress bar
    assert message.startswith(f"Error: {NAME} runs from flash once it is converted")
    assert message.endswith("Add --yes to agree.")
    with pytest.raises(FlashError, match="hub is not a flash folder.*flash convert ti"):
        mlx_flash.load(NAME)
    assert "model.safetensors" not in hub.fetched


def test_cached_snapshot_serves_without_a_hub(hub, checkpoint, monkeypatch):
    hub.files = files_of(checkpoint)
    first = find_model(NAME, checkpoint=True)
    shut(hub, monkeypatch)
    assert find_model(NAME, checkpoint=True) == first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model(NAME, checkpoint=True) == first
    assert find_model(NAME, revision=COMMIT, checkpoint=True) == first


def test_half_a_cached_snapshot_does_not(hub, checkpoint, monkeypatch):
    hub.files = files_of(checkpoint)
    with pytest.raises(FlashError, match="not a flash folder"):
        find_model(NAME)  # brings configuration alone
    # (Without a hub but not in this mode, the library tries for some twenty seconds.)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FlashError, match="could not be downloaded.*network"):
        find_model(NAME, checkpoint=True)


# Refusals


def refused(args):
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize(
    "command",
    [["convert", "no/model", "-o", "out"], ["generate", "a", "--model", "no/model"]],
)
def test_unknown_name(hub, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.status, hub.error_code = 401, "RepoNotFound"
    message = refused(command)
    assert "The hub has no model no/model" in message and "no such folder" in message
    assert not (tmp_path / "out").exists()


def test_gated_repository(hub):
    hub.status, hub.error_code = 403, "GatedRepo"
    message = refused(["info", NAME])
    assert f"{NAME} is gated" in message and "hf auth login" in message


def test_unknown_revision(hub, checkpoint, tmp_path):
    hub.files = files_of(checkpoint)
    dst = str(tmp_path / "out")
    message = refused(["convert", NAME, "-o", dst, "--revision", "v9"])
    assert f"{NAME} has no revision 'v9'" in message


def test_no_network(cache):
    begin = time.perf_counter()
    message = refused(["info", NAME])
    assert "could not be downloaded" in message and "network" in message
    assert time.perf_counter() - begin < 10


def test_hub_that_is_broken(hub):
    hub.status = 500
    assert "could not be downloaded" in refused(["info", NAME])


def test_offline_mode(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "could not be downloaded" in refused(["info", NAME])


def http_response(status):
    """A response of whichever HTTP client this version of the library uses."""
    client = __import__(hub_errors.HTTPError.__module__.split(".")[0])
    return client.Response(status, request=client.Request("GET", "http://hub"))


@pytest.mark.parametrize(
    "error, words",
    [
        (lambda: hub_errors.GatedRepoError("x", response=http_response(403)), "gated"),
        (
            lambda: hub_errors.RepositoryNotFoundError(
                "x", response=http_response(404)
            ),
            "has no model",
        ),
        (
            lambda: hub_errors.RevisionNotFoundError("x", response=http_response(404)),
            "no revision",
        ),
        (lambda: hub_errors.LocalEntryNotFoundError("x\ny"), "network"),
        (
            lambda: hub_errors.HfHubHTTPError("x", response=http_response(429)),
            "network",
        ),
        (lambda: hub_errors.HFValidationError("two -- are not allowed"), "name"),
        (lambda: TimeoutError("read timed out"), "network"),
        (lambda: ConnectionResetError(104, "Connection reset by peer"), "network"),
        (lambda: client_error("ConnectError"), "network"),
        (lambda: client_error("ReadTimeout"), "network"),
        (lambda: client_error("RemoteProtocolError"), "network"),
        (lambda: OSError(28, os.strerror(28)), "disk is full"),
    ],
)
def test_whatever_the_library_raises_is_one_line(cache, monkeypatch, error, words):
    def fail(*args, **kwargs):
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = refused(["info", NAME])
    assert NAME in message and words in message


def client_error(name):
    client = __import__(hub_errors.HTTPError.__module__.split(".")[0])
    return getattr(client, name)("the line\nis broken")
