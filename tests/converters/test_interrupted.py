"""Conversions that were interrupted go on, and give the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from conversions import OPTIONS, convert_plain, interrupt
from opt_checkpoints import files_of, load, make_checkpoint, save

from mlx_flash.cli import main
from mlx_flash.converters import conversion
from mlx_flash.converters.calibrate import fit, layerwise, text
from mlx_flash.converters.convert import convert
from mlx_flash.converters.workfolder import WorkFolder
from mlx_flash.errors import FlashError


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A checkpoint of three layers, and the files of its undisturbed conversion."""
    base = tmp_path_factory.mktemp("undisturbed")
    src = make_checkpoint(base / "model", num_hidden_layers=3)
    return src, files_of(convert(src, base / "flash", **OPTIONS))


@pytest.fixture
def three_layers(tmp_path, undisturbed):
    src = shutil.copytree(undisturbed[0], tmp_path / "model")
    return src, undisturbed[1]


@pytest.fixture
def written(monkeypatch):
    """Names of the layer files that were written, in order."""
    names, real = [], conversion.write_bundles

    def count(path, *args):
        entry = real(path, *args)
        names.append(Path(entry.file).stem)
        return entry

    monkeypatch.setattr(conversion, "write_bundles", count)
    return names


@pytest.mark.parametrize(
    "owner, name, call, after, layers",
    [
        (layerwise.LayerwiseModel, "logits", 7, False, 3),  # sampling the text
        (text, "sample_tokens", 1, True, 3),
        (layerwise.LayerwiseModel, "run_text", 1, False, 3),
        (fit, "_train", 1, False, 3),
        (fit, "_train", 2, True, 3),
        (conversion, "write_bundles", 2, False, 3),
        (conversion, "write_bundles", 2, True, 4),  # written, but not noted
        (WorkFolder, "record", 1, True, 3),
        (WorkFolder, "note", 2, False, 4),
        (WorkFolder, "note", 2, True, 3),  # between two layers
        (WorkFolder, "save_array", 3, False, 3),
        (WorkFolder, "save_array", 3, True, 3),
        (os, "replace", 8, False, 4),
        (conversion, "_write_rest", 1, False, 3),
        (conversion, "copy_config", 1, False, 3),
        (conversion, "copy_config", 1, True, 3),
        (WorkFolder, "publish", 1, False, 3),
    ],
)
def test_interrupted_goes_on(
    tmp_path, three_layers, written, monkeypatch, owner, name, call, after, layers
):
    src, whole = three_layers
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, call, after)
        with pytest.raises(KeyboardInterrupt):
            convert(src, tmp_path / "flash", **OPTIONS)
    assert not (tmp_path / "flash").exists()
    assert not list(tmp_path.rglob("*.part"))
    assert files_of(convert(src, tmp_path / "flash", **OPTIONS)) == whole
    # No finished layer was converted again.
    assert len(written) == layers
    assert sorted(set(written)) == ["layer_00", "layer_01", "layer_02"]
    assert {p.name for p in tmp_path.iterdir()} == {"model", "flash"}


def test_interrupted_at_every_layer_goes_on(
    tmp_path, three_layers, written, monkeypatch
):
    src, whole = three_layers
    for _ in range(3):
        with monkeypatch.context() as patch:
            interrupt(patch, fit, "_train", 2)
            try:
                convert(src, tmp_path / "flash", **OPTIONS)
            except KeyboardInterrupt:
                continue
    assert files_of(tmp_path / "flash") == whole
    assert len(written) == 3


def test_interrupted_while_it_replaces(tmp_path, three_layers, monkeypatch):
    """Between the two renames neither folder has the name; the next run mends it."""
    src, whole = three_layers
    other = make_checkpoint(tmp_path / "other", num_hidden_layers=3, seed=1)
    dst = convert_plain(other, tmp_path / "flash")
    real = os.replace

    def break_after_first(a, b):
        real(a, b)
        if Path(b).name == "old":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", break_after_first)
        with pytest.raises(KeyboardInterrupt):
            convert(src, dst, overwrite=True, **OPTIONS)
    convert(src, dst, **OPTIONS)
    assert files_of(dst) == whole
    assert {p.name for p in tmp_path.iterdir()} == {"model", "other", "flash"}


def test_killed_goes_on(tmp_path, three_layers, written):
    src, whole = three_layers
    script = f"""
import time
from mlx_flash.converters.convert import convert
from mlx_flash.converters.workfolder import WorkFolder
note = WorkFolder.note
def note_and_wait(self):
    note(self)
    if len(self.layers) == 2:
        time.sleep(60)
WorkFolder.note = note_and_wait
convert({str(src)!r}, {str(tmp_path / "flash")!r}, **{OPTIONS!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    progress = tmp_path / "flash.partial/work/progress.json"
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if progress.exists() and len(json.loads(progress.read_text())["layers"]) == 2:
            break
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "flash").exists()
    convert(src, tmp_path / "flash", **OPTIONS)
    assert files_of(tmp_path / "flash") == whole
    assert written == ["layer_02"]


def interrupted(src, dst, monkeypatch, layers, **options):
    """Convert until `layers` layers are done."""
    with monkeypatch.context() as patch:
        interrupt(patch, WorkFolder, "note", layers, after=True)
        with pytest.raises(KeyboardInterrupt):
            convert(src, dst, **{**OPTIONS, **options})


@pytest.mark.parametrize("change", ["content", "touched", "cut", "config"])
def test_source_that_changed_is_refused(
    refuse, tmp_path, three_layers, monkeypatch, change
):
    src, _ = three_layers
    interrupted(src, tmp_path / "flash", monkeypatch, 1)
    file = src / ("config.json" if change == "config" else "model.safetensors")
    if change == "content":
        save(file, {k: -w for k, w in load(file).items()})
    elif change == "touched":
        os.utime(file, ns=(0, 0))
    elif change == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    else:
        file.write_text(file.read_text() + " ")
    before = files_of(tmp_path)
    with pytest.raises(FlashError, match="changed since.*rm -r .*flash.partial"):
        convert(src, tmp_path / "flash", **OPTIONS)
    assert files_of(tmp_path) == before


def test_source_that_changes_during_the_run_is_refused(
    tmp_path, three_layers, monkeypatch
):
    src, _ = three_layers
    real = conversion.write_bundles

    def touch(path, *args):
        os.utime(src / "model.safetensors", ns=(0, 0))
        return real(path, *args)

    monkeypatch.setattr(conversion, "write_bundles", touch)
    with pytest.raises(FlashError, match="changed since"):
        convert(src, tmp_path / "flash", **OPTIONS)
    assert not (tmp_path / "flash").exists()


def test_other_options_would_lose_finished_layers(tmp_path, three_layers, monkeypatch):
    src, whole = three_layers
    interrupted(src, tmp_path / "flash", monkeypatch, 1)
    with pytest.raises(FlashError, match="other options.*rm -r"):
        convert(src, tmp_path / "flash", **{**OPTIONS, "rank": 5})
    assert files_of(convert(src, tmp_path / "flash", **OPTIONS)) == whole


def test_other_options_before_any_layer_begin_anew(tmp_path, three_layers, monkeypatch):
    src, whole = three_layers
    with monkeypatch.context() as patch:
        interrupt(patch, fit, "_train", 1)
        with pytest.raises(KeyboardInterrupt):
            convert(src, tmp_path / "flash", **{**OPTIONS, "calibration_tokens": 256})
    assert (tmp_path / "flash.partial/work/tokens.npy").exists()
    assert files_of(convert(src, tmp_path / "flash", **OPTIONS)) == whole


def test_progress_that_was_never_written_out_begins_anew(
    tmp_path, three_layers, monkeypatch
):
    src, whole = three_layers
    interrupted(src, tmp_path / "flash", monkeypatch, 1)
    (tmp_path / "flash.partial/work/progress.json").write_bytes(b"\0" * 100)
    assert files_of(convert(src, tmp_path / "flash", **OPTIONS)) == whole


def test_stderr_tells_how_to_go_on(tmp_path, checkpoint, monkeypatch):
    interrupt(monkeypatch, conversion, "write_bundles", 2)
    args = ["convert", str(checkpoint), "-o", str(tmp_path / "flash"), "--rank", "0"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("Interrupted. The same command")
