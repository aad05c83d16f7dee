"""Where a conversion writes, and what it leaves alone there."""

import fcntl
import json
import os
import shutil

import numpy as np
import pytest
from conversions import OPTIONS, convert_plain, interrupt
from opt_checkpoints import files_of, load, make_checkpoint, save

from mlx_flash.converters import conversion, resident
from mlx_flash.converters import convert as module
from mlx_flash.converters.convert import convert
from mlx_flash.converters.workfolder import WorkFolder
from mlx_flash.errors import FlashError


def test_folders_of_others_are_left_alone(tmp_path, checkpoint):
    dst = convert_plain(checkpoint, tmp_path / "flash")
    mine = tmp_path / "flash.old"
    mine.mkdir()
    (mine / "note.txt").write_text("mine")
    convert_plain(checkpoint, dst, overwrite=True)
    assert (mine / "note.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["work/thesis.txt", "flash/thesis.txt", "thesis.txt"])
def test_a_work_folder_of_others_is_left_alone(refuse, tmp_path, checkpoint, name):
    mine = tmp_path / "flash.partial" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(FlashError, match="in the way"):
        convert_plain(checkpoint, tmp_path / "flash")
    assert mine.read_text() == "mine"


def test_a_link_in_place_of_the_work_folder(tmp_path, checkpoint):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "flash.partial").symlink_to("elsewhere")
    with pytest.raises(FlashError, match="in the way"):
        convert_plain(checkpoint, tmp_path / "flash")


def test_two_conversions_into_one_destination(refuse, tmp_path, checkpoint):
    taken = tmp_path / "flash.mlx-flash-lock"
    with open(taken, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refuse(checkpoint, "Another conversion", tmp_path / "flash", "running")
    convert_plain(checkpoint, tmp_path / "flash")
    assert not taken.exists()


def test_the_root_the_source_and_odd_files(refuse, tmp_path, checkpoint):
    refuse(checkpoint, "/ cannot be replaced", dst="/")
    refuse(checkpoint, "no flash folder", dst=checkpoint, options=("--overwrite",))
    os.mkfifo(tmp_path / "pipe")
    refuse(checkpoint, "no flash folder", dst=tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    refuse(checkpoint, "link to itself", dst=tmp_path / "loop")
    inside = shutil.move(checkpoint, tmp_path / "flash.partial")
    with pytest.raises(FlashError, match="lies inside"):
        convert_plain(inside, tmp_path / "flash")


class Killed(BaseException):
    """What stops a conversion at once, as a kill does: nothing is tidied."""


def kill(patch, owner, name, call, after=False):
    patch.setattr(WorkFolder, "drop_if_empty", lambda self: None)
    interrupt(patch, owner, name, call, after, error=Killed)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "owner, name, call, after",
    [
        (WorkFolder, "publish", 1, False),
        (WorkFolder, "publish", 1, True),
        (WorkFolder, "discard", 2, False),
        (WorkFolder, "discard", 2, True),
        (module, "verify", 1, False),
        (os, "unlink", 1, False),
    ],
)
def test_killed_when_all_is_written(
    tmp_path, checkpoint, monkeypatch, owner, name, call, after, overwrite
):
    """The same command goes on, though half of the source may be gone by now."""
    whole = files_of(convert_plain(checkpoint, tmp_path / "whole"))
    other = make_checkpoint(tmp_path / "other", seed=1)
    if overwrite:
        convert_plain(other, tmp_path / "flash")
    options = {"delete_source": True, "overwrite": overwrite}
    with monkeypatch.context() as patch:
        kill(patch, owner, name, call, after)
        with pytest.raises(Killed):
            convert_plain(checkpoint, tmp_path / "flash", **options)
    convert_plain(checkpoint, tmp_path / "flash", **options)
    assert files_of(tmp_path / "flash") == whole
    assert not (checkpoint / "model.safetensors").exists()
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"model", "other", "whole", "flash"}


def test_what_a_kill_left_is_not_taken_for_another_command(
    tmp_path, checkpoint, monkeypatch
):
    other = make_checkpoint(tmp_path / "other", seed=1)
    with monkeypatch.context() as patch:
        kill(patch, WorkFolder, "publish", 1, after=True)
        with pytest.raises(Killed):
            convert_plain(checkpoint, tmp_path / "flash")
    with pytest.raises(FlashError, match="Add --overwrite"):
        convert_plain(other, tmp_path / "flash")
    whole = files_of(convert_plain(other, tmp_path / "whole"))
    convert_plain(other, tmp_path / "flash", overwrite=True)
    assert files_of(tmp_path / "flash") == whole


def lose(file):
    file.unlink()


def flip(file):
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [lose, flip])
@pytest.mark.parametrize(
    "name",
    [
        "work/order_00.npy",
        "work/hidden_01.npy",
        "work/predictor_00.safetensors",
        "work/tokens.npy",
        "flash/ffn/layer_00.safetensors",
    ],
)
def test_damaged_work_files_are_noticed(
    tmp_path, checkpoint, monkeypatch, name, damage
):
    with monkeypatch.context() as patch:
        interrupt(patch, WorkFolder, "note", 1, after=True)
        with pytest.raises(KeyboardInterrupt):
            convert(checkpoint, tmp_path / "flash", **OPTIONS)
    damage(tmp_path / "flash.partial" / name)
    with pytest.raises(FlashError, match=f"{name} is missing or damaged.*rm -r"):
        convert(checkpoint, tmp_path / "flash", **OPTIONS)
    assert not (tmp_path / "flash").exists()


def test_an_order_that_is_lost_in_the_end_is_noticed(tmp_path, checkpoint, monkeypatch):
    real = conversion._write_rest

    def lose_first(job, cutter):
        lose(tmp_path / "flash.partial/work/order_01.npy")
        return real(job, cutter)

    monkeypatch.setattr(conversion, "_write_rest", lose_first)
    with pytest.raises(FlashError, match="order_01.npy is missing"):
        convert(checkpoint, tmp_path / "flash", **OPTIONS)


def test_altered_progress_begins_anew(tmp_path, checkpoint, monkeypatch):
    whole = files_of(convert(checkpoint, tmp_path / "whole", **OPTIONS))
    with monkeypatch.context() as patch:
        interrupt(patch, WorkFolder, "note", 1, after=True)
        with pytest.raises(KeyboardInterrupt):
            convert(checkpoint, tmp_path / "flash", **OPTIONS)
    file = tmp_path / "flash.partial/work/progress.json"
    progress = json.loads(file.read_text())
    progress["layers"][0]["predictor"]["threshold"] += 0.125
    file.write_text(json.dumps(progress))
    assert files_of(convert(checkpoint, tmp_path / "flash", **OPTIONS)) == whole


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_source_that_changes_while_the_rest_is_written(
    tmp_path, checkpoint, monkeypatch, file
):
    """Size and time are as before: only the time of the change itself tells."""
    real = conversion.copy_config

    def change(source, *args):
        real(source, *args)
        path = checkpoint / file
        seen = path.stat()
        if file.endswith(".safetensors"):
            save(path, {k: np.negative(w) for k, w in load(path).items()})
        else:
            path.write_bytes(path.read_bytes())
        os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))

    monkeypatch.setattr(conversion, "copy_config", change)
    assert resident.copy_config is real
    with pytest.raises(FlashError, match="changed since"):
        convert_plain(checkpoint, tmp_path / "flash")
    assert not (tmp_path / "flash").exists()
