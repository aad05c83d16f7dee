"""Checkpoints in PyTorch's .bin files: the same folder, or refused."""

import collections
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

TOP = "model.decoder"


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_gives_the_same_folder(tmp_path, zipped):
    src = make_checkpoint(tmp_path / "a" / "model")
    bin_src = as_bin(
        src, tmp_path / "b" / "model", _use_new_zipfile_serialization=zipped
    )
    a = convert_plain(src, tmp_path / "fa")
    b = convert_plain(bin_src, tmp_path / "fb")
    assert files_of(a) == files_of(b)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_state_dict_of_several_files(tmp_path, dtype, zipped):
    """As PyTorch saves models: parameters, tied and transposed ones, files by index."""
    torch = pytest.importorskip("torch")
    src = make_checkpoint(tmp_path / "a" / "model", dtype)
    weights = {}
    for name, words in load(src / "model.safetensors").items():
        tensor = torch.from_numpy(words.copy()).view(getattr(torch, dtype))
        weights[name] = torch.nn.Parameter(tensor, requires_grad="fc1" in name)
        if name.endswith("fc2.weight"):  # values in another order in the file
            weights[name] = weights[name].data.t().contiguous().t()
    tied = dict(weights) | {"lm_head.weight": weights[f"{TOP}.embed_tokens.weight"]}
    wide = torch.cat([weights[f"{TOP}.final_layer_norm.bias"].data, torch.ones(7)])
    tied[f"{TOP}.final_layer_norm.bias"] = wide.to(getattr(torch, dtype))[:-7]
    names = list(tied)
    bin_src = shutil.copytree(src, tmp_path / "b" / "model")
    (bin_src / "model.safetensors").unlink()
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-0000{i}-of-00002.bin"
        state = collections.OrderedDict((name, tied[name]) for name in part)
        state._metadata = {"": {"version": 1}}
        options = {"_use_new_zipfile_serialization": zipped}
        torch.save(state, bin_src / file, **options)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (bin_src / "pytorch_model.bin.index.json").write_text(json.dumps(index))
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
    refuse(checkpoint, checkpoint / "pytorch_model.bin", "pip install 'torch>=2.10'")


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


ODD_TENSORS = {
    "float64": lambda torch: torch.ones(3, dtype=torch.float64),
    "complex64": lambda torch: torch.ones(3, dtype=torch.complex64),
    "float8_e4m3fn": lambda torch: torch.ones(3).to(torch.float8_e4m3fn),
    "sparse": lambda torch: torch.eye(3).to_sparse(),
    "meta": lambda torch: torch.empty(3, device="meta"),
    "larger than its values": lambda torch: torch.ones(1).expand(10**6, 10**7),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_tensors_that_are_no_plain_weights(refuse, tmp_path, kind):
    """Each would have been dropped, or ended in a traceback."""
    torch = pytest.importorskip("torch")
    src = as_bin(make_checkpoint(tmp_path / "a"), tmp_path / "model")
    file = src / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    torch.save(weights | {"odd": ODD_TENSORS[kind](torch)}, file)
    word = "no plain tensor" if kind in ("sparse", "meta") else kind
    refuse(src, file, "odd is", word)


def test_bin_whose_names_are_none(refuse, tmp_path):
    torch = pytest.importorskip("torch")
    src = as_bin(make_checkpoint(tmp_path / "a"), tmp_path / "model")
    torch.save({("a", "tuple"): torch.ones(3)}, src / "pytorch_model.bin")
    refuse(src, src / "pytorch_model.bin", "other things")


@pytest.mark.parametrize("version", ["2.5.1", "2.9.1+cu128", "1.13.0a0"])
def test_bin_with_a_torch_that_may_run_its_code(
    refuse, checkpoint, monkeypatch, version
):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__=version))
    refuse(checkpoint, version, "pip install 'torch>=2.10'")


def test_bin_without_a_dtype_in_the_config(refuse, tmp_path):
    src = as_bin(make_checkpoint(tmp_path / "a"), tmp_path / "model")
    (src / "config.json").write_text(json.dumps(CONFIG))
    refuse(src, src, "--dtype")
    convert_plain(src, tmp_path / "works", dtype="float32")
