"""Damaged and hostile .bin files, read by PyTorch itself: refused, or plain tensors."""

import importlib
import os
import pickle
import random
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from mlx_flash.converters.torch_bin import to_safetensors
from mlx_flash.errors import FlashError

DAMAGES = 1500  # of a zip file, and as many of a file of PyTorch before 1.6
pytestmark = pytest.mark.slow


class Call:
    """Unpickled without care, it is what `function(*args)` returns."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def damaged(rng, data):
    """The bytes with some others in them, cut, or with a hole."""
    data = bytearray(data)
    how = rng.randrange(4)
    if how == 0:
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif how == 1:
        del data[rng.randrange(len(data)) :]
    elif how == 2:
        start = rng.randrange(len(data))
        del data[start : start + rng.randrange(1, 60)]
    else:
        data[rng.randrange(700)] = rng.randrange(256)  # of the pickle
    return bytes(data)


def outcome(file, target, whole):
    try:
        to_safetensors(file, target)
    except FlashError as error:
        assert str(file) in str(error)
        return "refused"
    return "the same" if target.read_bytes() == whole else "other values"


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files(tmp_path, zipped, capsys):
    torch = pytest.importorskip("torch")
    file, target = tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors"
    torch.manual_seed(0)
    weights = {"a": torch.randn(20, 8).half(), "b": torch.randn(9).bfloat16()}
    weights["mask"] = torch.arange(5)
    torch.save(weights, file, _use_new_zipfile_serialization=zipped)
    data = file.read_bytes()
    to_safetensors(file, target)
    whole = target.read_bytes()
    rng, counts = random.Random(0), Counter()
    for _ in range(DAMAGES):
        file.write_bytes(damaged(rng, data))
        counts[outcome(file, target, whole)] += 1
    with capsys.disabled():
        print(f"\n{zipped=}: {dict(counts)}")


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_files(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    file, trace = tmp_path / "pytorch_model.bin", tmp_path / "trace"
    make = f"__import__('os').mkdir('{trace}')"
    calls = [
        Call(os.mkdir, str(trace)),
        Call(os.system, f"mkdir {trace}"),
        Call(eval, make),
        Call(exec, make),
        Call(subprocess.call, ["mkdir", str(trace)]),
        Call(importlib.import_module, "this"),
        Call(__import__, "antigravity"),
        Call(open, str(trace), "w"),
        Call(Path.mkdir, trace),
        Call(getattr, str(trace), "join"),
        Call(torch.load, str(file)),
        Call(torch.jit.load, str(file)),
        Call(torch.hub.load, "owner/name", "model"),
    ]
    for call in calls:
        options = {"_use_new_zipfile_serialization": zipped}
        torch.save({"a": call}, file, **options)
        assert outcome(file, tmp_path / "out", None) == "refused"
        torch.save(call, file, **options)
        assert outcome(file, tmp_path / "out", None) == "refused"
        torch.save({"a": torch.ones(2), "b": [call]}, file, **options)
        assert outcome(file, tmp_path / "out", None) == "refused"
        file.write_bytes(pickle.dumps(call))
        assert outcome(file, tmp_path / "out", None) == "refused"
        assert not trace.exists()
