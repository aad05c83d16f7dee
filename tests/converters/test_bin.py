"""Checkpoints in PyTorch's .bin files: the same folder, or refused."""

import json
import os
import pickle
import shutil
import sys
from types import SimpleNamespace

import pytest
from conversions import as_bin, assert_holds, convert_plain
from opt_checkpoints import CONFIG, files_of, load, make_checkpoint, random_weights

from mlx_flash.errors import FlashError


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_gives_the_same_folder(tmp_path, zipped):
    src = make_checkpoint(tmp_path / "a" / "model")
    bin_src = as_bin(
        src, tmp_path / "b" / "model", _use_new_zipfile_serialization=zipped
    )
    a = convert_plain(src, tmp_path / "fa")
    b = convert_plain(bin_src, tmp_path / "fb")
    assert files_of(a) == files_of(b)


def test_bin_keeps_bfloat16_and_drops_integer_buffers(tmp_path):
    torch = pytest.importorskip("torch")
    src = make_checkpoint(tmp_path / "model", "bfloat16")
    words = load(src / "model.safetensors")
    tensors = {k: torch.from_numpy(w.copy()) for k, w in words.items()}
    tensors = {k: w.view(torch.bfloat16) for k, w in tensors.items()}
    tensors["model.decoder.mask"] = torch.ones(3, dtype=torch.int64)
    (src / "model.safetensors").unlink()
    torch.save(tensors, src / "pytorch_model.bin")
    assert_holds(convert_plain(src, tmp_path / "flash"), words)


def test_safetensors_win_over_bin(tmp_path, checkpoint):
    (checkpoint / "pytorch_model.bin").write_bytes(b"never opened")
    assert_holds(
        convert_plain(checkpoint, tmp_path / "flash"),
        load(checkpoint / "model.safetensors"),
    )


def test_room_for_the_copy_of_a_bin_is_seen_first(tmp_path, monkeypatch):
    src = as_bin(make_checkpoint(tmp_path / "a"), tmp_path / "model")
    values = sum(w.size for w in random_weights().values())
    usage = SimpleNamespace(free=int(1.5 * 4 * values))  # enough for the result alone
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FlashError, match="Free some space"):
        convert_plain(src, tmp_path / "flash")
    convert_plain(tmp_path / "a", tmp_path / "flash")


def test_bin_without_torch(refuse, checkpoint, monkeypatch):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    refuse(checkpoint, checkpoint / "pytorch_model.bin", "pip install torch")


class Malicious:
    """Unpickled without care, it makes the file `trace`."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize(
    "kind", ["pickle", "torch", "list", "no tensors", "cut", "text", "empty"]
)
def test_bin_that_is_no_checkpoint(refuse, tmp_path, kind):
    torch = pytest.importorskip("torch")
    src = as_bin(make_checkpoint(tmp_path / "a"), tmp_path / "model")
    file, trace = src / "pytorch_model.bin", tmp_path / "trace"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Malicious(trace)))
    elif kind == "torch":
        torch.save({"x": Malicious(trace)}, file)
    elif kind == "list":
        torch.save([torch.ones(3)], file)
    elif kind == "no tensors":
        torch.save({"model": {"x": torch.ones(3)}}, file)
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        file.write_bytes(b"words\n" if kind == "text" else b"")
    refuse(src, file, "cannot be read as a PyTorch checkpoint")
    assert not trace.exists()


def test_bin_without_a_dtype_in_the_config(refuse, tmp_path):
    src = as_bin(make_checkpoint(tmp_path / "a"), tmp_path / "model")
    (src / "config.json").write_text(json.dumps(CONFIG))
    refuse(src, src, "--dtype")
    convert_plain(src, tmp_path / "works", dtype="float32")
