"""Options, texts and destinations that are refused, and nothing is left behind."""

import os
import shutil

import pytest
from conversions import convert_plain
from opt_checkpoints import files_of, make_checkpoint

from mlx_flash.converters.convert import convert
from mlx_flash.errors import FlashError


@pytest.mark.parametrize(
    "options, words, code",
    [
        (["--rank", "-1"], ["rank -1", "0 for none"], 1),
        (["--threshold", "2"], ["threshold", "2.0", "0.5"], 1),
        (["--threshold", "0"], ["threshold", "0.5"], 1),
        (["--recall", "0"], ["recall", "0.95"], 1),
        (["--recall", "1.1"], ["recall", "1.1", "0.95"], 1),
        (["--bits", "0"], ["of 0 bits", "2, 3, 4, 5, 6 or 8"], 1),
        (["--bits", "7"], ["of 7 bits", "2, 3, 4, 5, 6 or 8"], 1),
        (["--resident-bits", "1"], ["of 1 bits", "2, 3, 4, 5, 6 or 8"], 1),
        (["--bits", "4", "--group-size", "16"], ["groups of 16", "32, 64 or 128"], 1),
        (["--bits", "4", "--group-size", "0"], ["groups of 0", "32, 64 or 128"], 1),
        (["--mode", "nvfp4", "--bits", "8"], ["nvfp4 has 4 bits in groups of 16"], 1),
        (["--mode", "mxfp8", "--group-size", "64"], ["mxfp8 has 8 bits", "of 32"], 1),
        (["--mode", "fp3"], ["'fp3'", "affine, mxfp4, mxfp8, nvfp4"], 1),
        (["--calibration-tokens", "0"], ["--calibration-tokens", "0"], 2),
        (["--dtype", "float64"], ["--dtype", "float64", "bfloat16"], 2),
    ],
)
def test_options_that_cannot_be(refuse, checkpoint, options, words, code):
    refuse(checkpoint, *words, options=options, code=code)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--group-size", "32"], ["Groups of 32", "--bits"]),
        (["--revision", "main"], ["--revision would be ignored", "is a folder here"]),
        (["--rank", "0", "--recall", "0.9"], ["--recall would be", "--rank 0 makes"]),
        (["--rank", "0", "--calibration", "x"], ["--calibration would be ignored"]),
        (["--threshold", "0.4", "--recall", "0.9"], ["--recall", "--threshold sets"]),
        (["--unit", "block", "--rank", "8"], ["--rank would be ignored", "blocks"]),
        (
            ["--unit", "block", "--threshold", "0.4", "--calibration-tokens", "99"],
            ["--calibration-tokens and --threshold would be ignored"],
        ),
    ],
)
def test_options_that_would_be_ignored(refuse, checkpoint, options, words):
    refuse(checkpoint, *words, options=options)


def test_python_callers_are_judged_too(tmp_path, checkpoint):
    for options, words in (
        ({"dtype": "float64"}, "float64.*bfloat16"),
        ({"calibration_tokens": 0}, "calibration tokens"),
        ({"fit_steps": 0}, "0 fit steps"),
    ):
        with pytest.raises(FlashError, match=words):
            convert(checkpoint, tmp_path / "flash", **options)


@pytest.mark.parametrize(
    "data, words",
    [
        (None, ["cannot be read", "No such file"]),
        (b"too short", ["9 tokens", "at least 126"]),
        (b"", ["0 tokens"]),
        (b"\x7fELF\0\0\0" * 4000, ["no text file", "UTF-8"]),
        ("words ".encode("utf-16") * 2000, ["no text file", "UTF-8"]),
    ],
)
def test_calibration_file_that_is_of_no_use(refuse, tmp_path, checkpoint, data, words):
    text = tmp_path / "text.txt"
    if data is not None:
        text.write_bytes(data)
    refuse(checkpoint, text, *words, options=("--calibration", text))


def test_folder_as_calibration_file(refuse, tmp_path, checkpoint):
    refuse(checkpoint, tmp_path, "directory", options=("--calibration", tmp_path))


def test_calibration_file_needs_a_tokenizer(refuse, tmp_path):
    src = make_checkpoint(tmp_path / "model", tokenizer=False)
    text = tmp_path / "text.txt"
    text.write_text("words " * 100)
    refuse(src, src, "no usable tokenizer", options=("--calibration", text))


def test_tokenizer_of_another_model(refuse, tmp_path):
    src = make_checkpoint(tmp_path / "model", vocab_size=50)
    text = tmp_path / "text.txt"
    text.write_text("words " * 100)
    refuse(src, "tokenizer", "49", options=("--calibration", text))


def test_destination_that_is_something_else(refuse, tmp_path, checkpoint):
    dst = tmp_path / "notes"
    dst.mkdir()
    (dst / "note.txt").write_text("mine")
    refuse(checkpoint, dst, "no flash folder", options=("--overwrite",), dst=dst)
    assert (dst / "note.txt").read_text() == "mine"


def test_destination_that_is_a_file(refuse, checkpoint):
    dst = checkpoint / "config.json"
    refuse(checkpoint, dst, "no flash folder", dst=dst)
    refuse(checkpoint, "Not a directory", dst=dst / "flash")


def test_destination_that_is_done(refuse, tmp_path, checkpoint):
    dst = convert_plain(checkpoint, tmp_path / "done")
    before = files_of(dst)
    refuse(checkpoint, dst, "--overwrite", dst=dst)
    assert files_of(dst) == before


def test_destination_whose_work_folder_is_taken(refuse, tmp_path, checkpoint):
    taken = tmp_path / "flash.partial"
    taken.mkdir()
    (taken / "note.txt").write_text("mine")
    before = files_of(tmp_path)
    with pytest.raises(FlashError, match="in the way"):
        convert_plain(checkpoint, tmp_path / "flash")
    assert files_of(tmp_path) == before


def test_a_checkpoint_inside_what_would_be_replaced(refuse, tmp_path, checkpoint):
    dst = convert_plain(checkpoint, tmp_path / "done")
    inner = shutil.move(checkpoint, dst / "original")
    refuse(inner, "lies inside", dst, options=("--overwrite",), dst=dst)
    assert (dst / "original" / "model.safetensors").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_permission_denied(refuse, tmp_path, checkpoint):
    file = checkpoint / "model.safetensors"
    file.chmod(0)
    refuse(checkpoint, file, "Permission denied")
    file.chmod(0o644)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refuse(checkpoint, locked, "Permission denied", dst=locked / "flash")
