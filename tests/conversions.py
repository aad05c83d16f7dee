"""What the tests of converters share: conversions, and how they end too early."""

import json
import shutil

import pytest
from click.testing import CliRunner
from opt_checkpoints import load, make_checkpoint

from mlx_flash.cli import main
from mlx_flash.converters.convert import convert
from mlx_flash.storage.manifest_reading import read_manifest

LAYER = "model.decoder.layers"
# Random weights are active half of the time: without `unit` they would become blocks.
OPTIONS = {
    "unit": "neuron",
    "rank": 4,
    "calibration_tokens": 128,
    "fit_steps": 3,
    "progress": False,
}


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "model")


def convert_plain(src, dst, **options):
    return convert(src, dst, rank=0, progress=False, **options)


def neurons_of(folder, layer):
    """(up rows, down columns) as stored words [units, bytes], by the manifest."""
    entry = json.loads((folder / "flash.json").read_text())["layers"][layer]
    bundles = load(folder / entry["file"])["bundles"]
    up, down = (slice(p["offset"], p["offset"] + p["bytes"]) for p in entry["parts"])
    return bundles[:, up], bundles[:, down]


def assert_holds(folder, weights):
    """The flash folder holds exactly these weights (stored words, hub's names)."""
    weights = dict(weights)
    manifest = read_manifest(folder)
    assert manifest.model_bytes == sum(w.nbytes for w in weights.values())
    for i in range(len(manifest.layers)):
        up, down = neurons_of(folder, i)
        fc1 = weights.pop(f"{LAYER}.{i}.fc1.weight")
        fc2 = weights.pop(f"{LAYER}.{i}.fc2.weight")
        for unit in range(len(fc1)):
            assert up[unit].tobytes() == fc1[unit].tobytes()
            assert down[unit].tobytes() == fc2[:, unit].tobytes()
    kept = load(folder / "resident.safetensors")
    for name, words in weights.items():
        name = name.replace("fc1.bias", "mlp.fc1.bias")
        stored = kept.pop(name.replace("fc2.bias", "mlp.fc2.bias"))
        assert stored.dtype == words.dtype and stored.tobytes() == words.tobytes()
    assert not kept


def as_bin(src, dst, **options):
    torch = pytest.importorskip("torch")
    shutil.copytree(src, dst)
    weights = load(dst / "model.safetensors")
    (dst / "model.safetensors").unlink()
    tensors = {k: torch.from_numpy(w.copy()) for k, w in weights.items()}
    torch.save(tensors, dst / "pytorch_model.bin", **options)
    return dst


@pytest.fixture
def refuse(tmp_path):
    def run(src, *words, options=("--rank", "0"), code=1, dst=None, left=()):
        before = {p for p in tmp_path.rglob("*") if p.is_file()}
        dst = dst or tmp_path / "flash"
        args = ["convert", str(src), "-o", str(dst), "-q", *map(str, options)]
        result = CliRunner().invoke(main, args)
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        message = result.stderr.strip().splitlines()[-1]
        assert message.startswith("Error: ")
        if code == 1:
            assert result.stderr.count("\n") == 1, result.stderr
        for word in words:
            assert str(word) in message, message
        after = {p for p in tmp_path.rglob("*") if p.is_file()}
        assert {str(p.relative_to(tmp_path)) for p in after - before} == set(left)
        if not left:
            assert not list(tmp_path.rglob("*.part*"))
        return message

    return run


def interrupt(patch, owner, name, call, after=False, error=KeyboardInterrupt):
    """Let a call of `owner.name` end in `error`, before or after its work."""
    real, calls = getattr(owner, name), []

    def broken(*args, **kwargs):
        calls.append(args)
        if len(calls) == call and not after:
            raise error
        result = real(*args, **kwargs)
        if len(calls) == call:
            raise error
        return result

    patch.setattr(owner, name, broken)
