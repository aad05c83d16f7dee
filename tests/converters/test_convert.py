"""Converting: bytes against the checkpoint, and what calibration sees."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conversions import LAYER, assert_holds, convert_plain
from opt_checkpoints import CONFIG, files_of, load, make_checkpoint, random_weights

from mlx_flash.checkpoints.stock import load_stock
from mlx_flash.converters.calibrate import layerwise, text
from mlx_flash.converters.convert import convert
from mlx_flash.converters.source import Source
from mlx_flash.planning.outline import outline
from mlx_flash.storage.manifest_reading import read_manifest

GOLDENS = Path(__file__).parents[1] / "goldens" / "opt"


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
        recorders.append(layerwise.Recorder(layer.mlp))
        layer.mlp = recorders[-1]
    mx.eval(whole(mx.array(tokens)))
    for inputs, recorder in zip(seen, recorders, strict=True):
        assert np.abs(inputs - recorder.inputs[0]).max() < 1e-4


def test_the_dtype_is_that_of_most_values(tmp_path):
    """Not that of the largest tensor, and alike wherever it is asked for."""
    folder = make_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    file = str(folder / "model.safetensors")
    weights = {name: array.astype(mx.float16) for name, array in mx.load(file).items()}
    largest = max(weights, key=lambda name: weights[name].size)
    weights[largest] = weights[largest].astype(mx.float32)
    mx.eval(weights)
    mx.save_safetensors(file, weights)
    assert Source(folder).dtype() == "float16"
    assert load_stock(folder).dtype() == "float16"
    assert outline(folder).manifest.dtype == "float16"
