"""Checkpoints that are refused: exit code 1, one line, and nothing is left behind."""

import json

import numpy as np
import pytest
from conversions import LAYER, convert_plain
from opt_checkpoints import CONFIG, make_checkpoint, random_weights


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
    files = [f"flash/ffn/layer_{i:02}.safetensors" for i in range(done)]
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
