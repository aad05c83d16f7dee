"""Converting: bytes against the checkpoint, interruptions, and everything refused."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from opt_checkpoints import (
    CONFIG,
    files_of,
    load,
    make_checkpoint,
    random_weights,
    save,
)

from mlx_flash.cli import main
from mlx_flash.converters import bundles, conversion
from mlx_flash.converters.calibrate import fit, layerwise, text
from mlx_flash.converters.convert import convert
from mlx_flash.converters.source import Source
from mlx_flash.converters.workfolder import WorkFolder
from mlx_flash.errors import FlashError
from mlx_flash.storage.manifest import read_manifest

GOLDENS = Path(__file__).parents[1] / "goldens" / "opt"
LAYER = "model.decoder.layers"


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


# What is written


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_byte_is_kept(tmp_path, dtype):
    weights = random_weights()
    odd = [-0.0, 0.0, 6e-8, -6e-8, 1e-39, -1e-39, 65504.0, -1.0]  # some subnormal
    for name in (f"{LAYER}.0.fc1.weight", f"{LAYER}.1.fc2.weight"):
        weights[name][3, : len(odd)] = odd
    weights["model.decoder.embed_tokens.weight"][0, : len(odd)] = odd
    src = make_checkpoint(tmp_path / "model", dtype, weights=weights)
    folder = convert_plain(src, tmp_path / "flash")
    assert_holds(folder, load(src / "model.safetensors"))
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("variant", ["pre_ln", "post_ln_proj", "no_bias_untied"])
def test_golden_checkpoints_are_kept(tmp_path, variant):
    folder = convert_plain(GOLDENS / variant, tmp_path / "flash")
    assert_holds(folder, load(GOLDENS / variant / "model.safetensors"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_is_converted(tmp_path, checkpoint, dtype):
    folder = convert_plain(checkpoint, tmp_path / "flash", dtype=dtype)

    def rounded(w):
        if dtype == "float16":
            return w.astype(np.float16)
        bits = w.view(np.uint32).astype(np.uint64)  # to the nearest, ties to even
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    source = load(checkpoint / "model.safetensors")
    assert_holds(folder, {name: rounded(w) for name, w in source.items()})
    assert read_manifest(folder).dtype == dtype


def test_source_config_need_not_name_a_dtype(tmp_path):
    src = make_checkpoint(tmp_path / "model", "float16")
    config = {k: v for k, v in CONFIG.items() if k != "dtype"}
    (src / "config.json").write_text(json.dumps(config))
    folder = convert_plain(src, tmp_path / "flash")
    assert_holds(folder, load(src / "model.safetensors"))


def test_shards_give_the_same_folder(tmp_path):
    one = make_checkpoint(tmp_path / "one" / "model")
    three = make_checkpoint(tmp_path / "three" / "model", shards=3)
    assert len(list(three.glob("*.safetensors"))) == 3
    a = convert_plain(one, tmp_path / "a")
    b = convert_plain(three, tmp_path / "b")
    assert files_of(a) == files_of(b)
    # The tokenizer comes along, a shard index does not.
    assert set(files_of(b)) == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "flash.json",
        "resident.safetensors",
        "ffn/layer_00.safetensors",
        "ffn/layer_01.safetensors",
    }


def test_names_without_prefix_and_a_head_that_is_tied(tmp_path):
    weights = random_weights()
    renamed = {k.removeprefix("model."): w for k, w in weights.items()}
    renamed["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"]
    src = make_checkpoint(tmp_path / "model", weights=renamed)
    assert_holds(convert_plain(src, tmp_path / "flash"), weights)


def test_source_is_left_alone_even_around_the_destination(checkpoint):
    before = files_of(checkpoint)
    folder = convert_plain(checkpoint, checkpoint / "flash")
    after = files_of(checkpoint)
    assert {k: v for k, v in after.items() if not k.startswith("flash/")} == before
    assert_holds(folder, load(checkpoint / "model.safetensors"))


def test_overwrite_replaces_all_of_the_old_folder(tmp_path, checkpoint):
    dst = convert_plain(checkpoint, tmp_path / "flash")
    (dst / "ffn" / "layer_07.safetensors").write_bytes(b"from a deeper model")
    other = make_checkpoint(tmp_path / "other", seed=1)
    convert_plain(other, dst, overwrite=True)
    assert_holds(dst, load(other / "model.safetensors"))
    assert not (dst / "ffn" / "layer_07.safetensors").exists()
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"model", "other", "flash"}


def test_an_empty_destination_is_filled(tmp_path, checkpoint, monkeypatch):
    (tmp_path / "flash").mkdir()
    monkeypatch.chdir(tmp_path / "flash")
    convert_plain(checkpoint, ".")
    assert_holds(tmp_path / "flash", load(checkpoint / "model.safetensors"))


def test_calibration_text_trains_predictors(tmp_path, checkpoint):
    text = tmp_path / "text.txt"
    text.write_text("Wörter, words und mots; " * 200)
    folder = convert(
        checkpoint,
        tmp_path / "flash",
        unit="neuron",
        calibration=text,
        calibration_tokens=640,
        rank=4,
        fit_steps=3,
        progress=False,
    )
    manifest = read_manifest(folder)
    assert manifest.calibration.text == "text.txt"
    assert manifest.calibration.tokens == 640
    assert manifest.calibration.held_out_tokens == 64
    assert [layer.predictor.rank for layer in manifest.layers] == [4, 4]
    shapes = {n: w.shape for n, w in load(folder / "predictors.safetensors").items()}
    for i in range(2):
        at = f"{LAYER}.{i}.mlp.predictor"
        assert shapes[f"{at}.reduce.weight"] == (4, 32)
        assert shapes[f"{at}.expand.weight"] == (64, 4)
        assert shapes[f"{at}.bias"] == (64,)


def test_few_calibration_tokens_are_two_sequences(tmp_path, checkpoint):
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 500)
    folder = convert(
        checkpoint,
        tmp_path / "flash",
        unit="neuron",
        calibration=text,
        calibration_tokens=1,
        rank=4,
        fit_steps=3,
    )
    assert read_manifest(folder).calibration.tokens == 128


def test_windows_come_from_all_of_the_text(tmp_path, checkpoint):
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(97 + i // 1000) * 1 for i in range(26000)))
    source = Source(checkpoint)
    tokens = text.text_tokens(source, file, 640)
    assert tokens.shape == (10, 64)
    assert (tokens[:, 0] == 2).all()  # as the tokenizer begins a text
    letters = np.unique(tokens[:, 1:])
    assert len(letters) >= 8
    assert letters.max() - letters.min() >= 23


def test_activations_are_those_of_the_whole_model(tmp_path, checkpoint):
    """What the layers see one at a time is what they see in the ordinary model."""
    import mlx.core as mx

    source = Source(checkpoint)
    model = layerwise.LayerwiseModel(source, mx.float32)
    tokens = np.random.default_rng(0).integers(4, 260, (5, 40)).astype(np.int32)
    hidden = model.embed_text(tokens)
    paths = [f"{LAYER}.{i}.mlp" for i in range(2)]
    seen = [model.run_text(i, path, hidden, tokens) for i, path in enumerate(paths)]

    whole = source.make_model()
    whole.load_weights(list(source.weights().items()))
    recorders = []
    for layer in whole.layers:
        recorders.append(layerwise._Recorder(layer.mlp))
        layer.mlp = recorders[-1]
    mx.eval(whole(mx.array(tokens)))
    for inputs, recorder in zip(seen, recorders, strict=True):
        assert np.abs(inputs - recorder.inputs[0]).max() < 1e-4


# .bin checkpoints


def as_bin(src, dst, **options):
    torch = pytest.importorskip("torch")
    shutil.copytree(src, dst)
    weights = load(dst / "model.safetensors")
    (dst / "model.safetensors").unlink()
    tensors = {k: torch.from_numpy(w.copy()) for k, w in weights.items()}
    torch.save(tensors, dst / "pytorch_model.bin", **options)
    return dst


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


# What is refused: exit code 1, one line, and nothing is left behind


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


def test_missing_path(refuse, tmp_path):
    refuse(tmp_path / "nothing", tmp_path / "nothing", "does not exist", "hub name")


def test_file_as_source(refuse, checkpoint):
    file = checkpoint / "config.json"
    refuse(file, file, "is a file")


def test_empty_folder_as_source(refuse, tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", tmp_path / "empty", "no config.json")


def test_flash_folder_as_source(refuse, tmp_path, checkpoint):
    folder = convert_plain(checkpoint, tmp_path / "done")
    refuse(folder, folder, "flash folder already")


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", ["config.json", "cannot be read"]),
        ("", ["config.json", "cannot be read"]),
        (b"\xff\xfe", ["config.json", "cannot be read"]),
        ("[1]", ["config.json", "model_type"]),
        ('"opt"', ["config.json", "model_type"]),
        ("{}", ["config.json", "model_type"]),
    ],
)
def test_config_that_is_none(refuse, checkpoint, text, words):
    data = text if isinstance(text, bytes) else text.encode()
    (checkpoint / "config.json").write_bytes(data)
    refuse(checkpoint, checkpoint, *words)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "gpt_neox_nope"}, ["gpt_neox_nope", "opt"]),
        ({"model_type": None}, ["config.json", "names no model_type"]),
        ({"model_type": ["opt"]}, ["config.json", "names no model_type"]),
        ({"hidden_size": None}, ["config.json", "hidden_size is missing"]),
        ({"vocab_size": None}, ["config.json", "vocab_size is missing"]),
        ({"num_hidden_layers": None}, ["config.json", "num_hidden_layers"]),
        ({"num_attention_heads": None}, ["config.json", "num_attention_heads"]),
        ({"num_attention_heads": 0}, ["config.json", "num_attention_heads"]),
        ({"hidden_size": "32"}, ["config.json", "hidden_size cannot be '32'"]),
        ({"hidden_size": -32}, ["config.json", "hidden_size cannot be -32"]),
        ({"num_attention_heads": 3}, ["config.json", "num_attention_heads 3"]),
        ({"ffn_dim": "many"}, ["config.json", "no possible model"]),
        ({"activation_function": "swish"}, ["swish", "relu"]),
        ({"quantization": {"bits": 4}}, ["group_size", "config.json"]),
        ({"ffn_dim": 48}, ["misshapen", f"{LAYER}.0.mlp.fc1"]),
        ({"num_hidden_layers": 3}, ["lacks", f"{LAYER}.2."]),
        ({"num_hidden_layers": 1}, ["does not know", f"{LAYER}.1."]),
    ],
)
def test_config_that_does_not_fit(refuse, checkpoint, change, words):
    config = {**CONFIG, **change}
    config = {k: v for k, v in config.items() if v is not None or k == "model_type"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    refuse(checkpoint, *words)


def test_generation_config_that_is_none(refuse, checkpoint):
    (checkpoint / "generation_config.json").write_text("[]")
    refuse(checkpoint, checkpoint, "generation_config.json", "cannot be read")


def test_no_weights(refuse, checkpoint):
    (checkpoint / "model.safetensors").unlink()
    refuse(checkpoint, checkpoint, "no weights", "model*.safetensors")


def test_shard_that_is_missing(refuse, tmp_path):
    src = make_checkpoint(tmp_path / "model", shards=3)
    shard = src / "model-00002-of-00003.safetensors"
    shard.unlink()
    refuse(src, shard, "is missing", "Download")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}']
)
def test_index_that_is_damaged(refuse, checkpoint, text):
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(text)
    refuse(checkpoint, index, "damaged", "Download")


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda b: b[:-5], ["cut short", "bytes"]),
        (lambda b: b[:4], ["not a whole safetensors file"]),
        (lambda b: b[:200], ["not a whole safetensors file"]),
        (lambda b: b"", ["not a whole safetensors file"]),
        (lambda b: b[:8] + b"[" + b[9:], ["damaged", "header"]),
        (lambda b: b"\xff" * 8 + b[8:], ["not a whole safetensors file"]),
        (lambda b: b.replace(b'"F32"', b'"F64"', 1), ["cannot be read"]),
        (lambda b: b.replace(b'"F32"', b'"Q32"', 1), ["cannot be read"]),
        (lambda b: b.replace(b"[0, ", b"[9, ", 1), ["damaged"]),
    ],
)
def test_weights_that_are_damaged(refuse, checkpoint, damage, words):
    file = checkpoint / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refuse(checkpoint, file, *words)


@pytest.mark.parametrize(
    "name, value, options, words",
    [
        (f"{LAYER}.0.fc1.weight", np.nan, ("--rank", 0), [f"{LAYER}.0.mlp.fc1.weight"]),
        (f"{LAYER}.1.fc2.weight", np.inf, ("--rank", 0), [f"{LAYER}.1.mlp.fc2.weight"]),
        (f"{LAYER}.1.fc1.bias", -np.inf, ("--rank", 0), [f"{LAYER}.1.mlp.fc1.bias"]),
        ("model.decoder.final_layer_norm.bias", np.nan, ("--rank", 0), ["final_layer"]),
    ],
)
def test_weights_that_are_no_numbers(refuse, tmp_path, name, value, options, words):
    weights = random_weights()
    weights[name].flat[-1] = value
    src = make_checkpoint(tmp_path / "model", weights=weights)
    left = left_by_interruption(tmp_path, name)
    refuse(src, *words, "NaN or infinite", "damaged", options=options, left=left)


def left_by_interruption(tmp_path, name):
    """Layers that were finished before the damage in `name` was met are kept."""
    done = 0 if ".layers.0." in name else 1 if ".layers.1." in name else 2
    files = [f"ffn/layer_{i:02}.safetensors" for i in range(done)]
    files += ["work/progress.json"] if done else []
    return [f"flash.partial/{file}" for file in files]


def test_nan_that_only_shows_in_the_calibration_text(refuse, tmp_path):
    weights = random_weights()
    weights[f"{LAYER}.0.self_attn.q_proj.weight"][0, 0] = np.nan
    src = make_checkpoint(tmp_path / "model", weights=weights)
    text = tmp_path / "text.txt"
    text.write_text("some words " * 100)
    refuse(
        src,
        "the output of layer 0",
        "NaN",
        options=("--calibration", text, "--rank", 4),
        left=["flash.partial/work/progress.json", "flash.partial/work/tokens.npy"],
    )


def test_too_large_for_float16(refuse, tmp_path):
    weights = random_weights()
    weights[f"{LAYER}.0.fc2.weight"][1, 1] = 1e5
    src = make_checkpoint(tmp_path / "model", weights=weights)
    name = f"{LAYER}.0.mlp.fc2.weight"
    options = ("--rank", 0, "--dtype", "float16")
    refuse(src, name, "infinite", "--dtype bfloat16", options=options)
    convert_plain(src, tmp_path / "works", dtype="bfloat16")


@pytest.mark.parametrize(
    "options, words, code",
    [
        (["--rank", "-1"], ["rank -1", "0 for none"], 1),
        (["--threshold", "2"], ["threshold", "2.0", "0.5"], 1),
        (["--threshold", "0"], ["threshold", "0.5"], 1),
        (["--recall", "0"], ["recall", "0.95"], 1),
        (["--recall", "1.1"], ["recall", "1.1", "0.95"], 1),
        (["--calibration-tokens", "0"], ["--calibration-tokens", "0"], 2),
        (["--dtype", "float64"], ["--dtype", "float64", "bfloat16"], 2),
    ],
)
def test_options_that_cannot_be(refuse, checkpoint, options, words, code):
    refuse(checkpoint, *words, options=options, code=code)


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


# A full disk


def test_too_little_room_is_seen_first(refuse, checkpoint, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refuse(checkpoint, "needs about 0.00 GB", checkpoint.parent)


def test_room_for_the_copy_of_a_bin_is_seen_first(tmp_path, monkeypatch):
    src = as_bin(make_checkpoint(tmp_path / "a"), tmp_path / "model")
    values = sum(w.size for w in random_weights().values())
    usage = SimpleNamespace(free=int(1.5 * 4 * values))  # enough for the result alone
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FlashError, match="Free some space"):
        convert_plain(src, tmp_path / "flash")
    convert_plain(tmp_path / "a", tmp_path / "flash")


def test_disk_that_fills_up_keeps_finished_layers(tmp_path, checkpoint, monkeypatch):
    whole = files_of(convert_plain(checkpoint, tmp_path / "whole"))
    real, calls = os.fsync, []

    def full(fd):
        calls.append(fd)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FlashError, match="disk is full.*layer_01.*same command"):
            convert_plain(checkpoint, tmp_path / "flash")
    assert not (tmp_path / "flash").exists()
    assert not list(tmp_path.rglob("*.part"))
    assert (tmp_path / "flash.partial/ffn/layer_00.safetensors").exists()
    assert files_of(convert_plain(checkpoint, tmp_path / "flash")) == whole


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(bytes) mounts a tmpfs of that size, or skips where it may not."""
    mounted = []

    def mount(size):
        disk = tmp_path / f"disk{len(mounted)}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"no mount here: {error}")
        if done.returncode:
            pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", str(disk)], check=True)


def test_disk_that_is_really_full(tmp_path, small_disk, monkeypatch):
    src = make_checkpoint(tmp_path / "model", num_hidden_layers=4, ffn_dim=512)
    options = OPTIONS | {"calibration_tokens": 256}
    whole = files_of(convert(src, tmp_path / "whole", **options))
    size = sum(map(len, whole.values()))
    small_disk(1 << 20)  # skips where it cannot be done
    plenty = SimpleNamespace(free=1 << 40)  # the check before would see it
    for share in (0.1, 0.3, 0.6, 0.9):
        disk = small_disk(int(size * share) // 4096 * 4096)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: plenty)
            with pytest.raises(FlashError, match="disk is full"):
                convert(src, disk / "flash", **options)
        assert not (disk / "flash").exists()
        assert not list(disk.rglob("*.part"))
        subprocess.run(["mount", "-o", "remount,size=64M", str(disk)], check=True)
        assert files_of(convert(src, disk / "flash", **options)) == whole
        assert [p.name for p in disk.iterdir()] == ["flash"]


# Interruptions


# Random weights are active half of the time: without `unit` they would become blocks.
OPTIONS = {
    "unit": "neuron",
    "rank": 4,
    "calibration_tokens": 128,
    "fit_steps": 3,
    "progress": False,
}


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
        (WorkFolder, "note", 1, True, 3),
        (WorkFolder, "note", 3, False, 4),
        (WorkFolder, "note", 3, True, 3),  # between two layers
        (WorkFolder, "save_array", 3, False, 3),
        (WorkFolder, "save_array", 3, True, 3),
        (os, "replace", 7, False, 4),
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
        if Path(b).name == "flash.old":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", break_after_first)
        with pytest.raises(KeyboardInterrupt):
            convert(src, dst, overwrite=True, **OPTIONS)
    convert(src, dst, **OPTIONS)
    assert files_of(dst) == whole
    assert not (tmp_path / "flash.old").exists()


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
        interrupt(patch, WorkFolder, "note", layers + 1, after=True)
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


def test_failing_disk_is_noticed(tmp_path, checkpoint, monkeypatch):
    """What is read back differs from what was written."""
    real = bundles.read_header

    def spoil(path):
        header, offset = real(path)
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(b"\xff\xff\xff\xff")
        return header, offset

    monkeypatch.setattr(bundles, "read_header", spoil)
    with pytest.raises(FlashError, match="layer_00.*reads back differently"):
        convert_plain(checkpoint, tmp_path / "flash")
    assert not (tmp_path / "flash").exists()


def test_stderr_tells_how_to_go_on(tmp_path, checkpoint, monkeypatch):
    interrupt(monkeypatch, conversion, "write_bundles", 2)
    args = ["convert", str(checkpoint), "-o", str(tmp_path / "flash"), "--rank", "0"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("Interrupted. The same command")
