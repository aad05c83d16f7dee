"""Every kind of FFN with exact zeros as neurons, against the whole model in memory."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as mlx_load_model
from stock_checkpoints import COMMON, save, stream

import mlx_flash
from mlx_flash.converters import conversion
from mlx_flash.converters import convert as converting
from mlx_flash.errors import FlashError
from mlx_flash.layers.projections import neuron_rows
from mlx_flash.models.registry import get_model_classes
from mlx_flash.storage.manifest_reading import read_manifest

LLAMA = COMMON | {"model_type": "llama", "intermediate_size": 128}
KINDS = {
    "relu llama": LLAMA | {"hidden_act": "relu"},
    "relu2 llama, biases": LLAMA | {"hidden_act": "relu2", "mlp_bias": True},
    "prosparse": LLAMA | {"hidden_act": "fatrelu", "hidden_act_param": 0.3},
    "turbosparse": LLAMA | {"model_type": "mistral", "hidden_act": "drelu"},
    "bamboo": LLAMA | {"model_type": "bamboo", "hidden_act": "relu"},
    "nemotron": LLAMA
    | {
        "model_type": "nemotron",
        "hidden_act": "relu2",
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
    },
    "nanochat": LLAMA | {"model_type": "nanochat"},
}
PACKINGS = [
    {"bits": 2, "group_size": 64, "mode": "affine"},
    {"bits": 3, "group_size": 32, "mode": "affine"},
    {"bits": 4, "group_size": 64, "mode": "affine"},
    {"bits": 6, "group_size": 64, "mode": "affine"},
    {"bits": 8, "group_size": 32, "mode": "affine"},
    {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    {"bits": 8, "group_size": 32, "mode": "mxfp8"},
]


def write_checkpoint(folder, config, dtype=mx.float32):
    model_class, args_class = get_model_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.random.seed(3)

    def draw(array):
        noise = 0.15 * mx.random.normal(array.shape)
        return (noise + (1.0 if array.ndim == 1 else 0.0)).astype(dtype)

    model.apply(draw)
    return save(folder, config, dict(tree_flatten(model.parameters())))


def resident(checkpoint, packing=None):
    """The whole model; its FFNs with the values that rows packed along D have."""
    model, _ = mlx_load_model(checkpoint, get_model_classes=get_model_classes)
    for layer in model.layers if packing else ():
        for name, rows in neuron_rows(layer.mlp).items():
            rows = mx.dequantize(*mx.quantize(rows, **packing), **packing)
            linear = layer.mlp[name]
            linear.weight = rows if rows.shape == linear.weight.shape else rows.T
    return model


def assert_parity(flash, reference, tolerance=2e-6):
    """Prompt, batch and decoding at five budgets, without predictors."""
    units = read_manifest(flash).layers[0].units
    tokens = mx.array(np.random.default_rng(0).integers(3, 90, (2, 9)))
    expected = reference(tokens)
    for slots in sorted({1, 5, units // 2, units - 1, units}):
        model = stream(flash, slots, predictor=False)
        diff = mx.abs(model(tokens) - expected).max() / mx.abs(expected).max()
        assert diff.item() < tolerance, slots
        cache, plain = make_prompt_cache(model), make_prompt_cache(reference)
        for token in range(3):
            one = mx.array([[token + 5]])
            a, e = model(one, cache=cache), reference(one, cache=plain)
            diff = mx.abs(a - e).max() / mx.abs(e).max()
            assert diff.item() < tolerance, slots
        assert (model.flash.stats.misses > 0) == (slots < units)
        model.flash.close()


@pytest.mark.parametrize("name", KINDS)
def test_bundles_compute_what_the_whole_model_does(tmp_path, name):
    checkpoint = write_checkpoint(tmp_path / "model", KINDS[name])
    flash = mlx_flash.convert(checkpoint, tmp_path / "flash", rank=0, progress=False)
    manifest = read_manifest(flash)
    assert manifest.unit == "neuron" and len(manifest.layers) == 2
    assert_parity(flash, resident(checkpoint))


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("name", ["prosparse", "nemotron"])
def test_quantised_along_the_models_width(tmp_path, name, packing):
    checkpoint = write_checkpoint(tmp_path / "model", KINDS[name])
    flash = mlx_flash.convert(
        checkpoint, tmp_path / "flash", rank=0, progress=False, **packing
    )
    assert_parity(flash, resident(checkpoint, packing), tolerance=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", [None, 4])
def test_half_precision(tmp_path, dtype, bits):
    checkpoint = write_checkpoint(tmp_path / "model", KINDS["relu llama"], dtype)
    flash = mlx_flash.convert(
        checkpoint, tmp_path / "flash", rank=0, bits=bits, progress=False
    )
    packing = bits and {"bits": bits, "group_size": 64, "mode": "affine"}
    tolerance = 5e-3 if dtype == mx.float16 else 4e-2
    assert_parity(flash, resident(checkpoint, packing), tolerance)


@pytest.mark.parametrize("name", ["prosparse", "bamboo", "nanochat"])
@pytest.mark.parametrize("bits", [None, pytest.param(8, marks=pytest.mark.slow)])
def test_a_predictor_of_the_gate_is_fitted_and_used(tmp_path, name, bits):
    checkpoint = write_checkpoint(tmp_path / "model", KINDS[name])
    flash = mlx_flash.convert(
        checkpoint,
        tmp_path / "flash",
        unit="neuron",
        rank=64,  # as wide as the model: the gate's choice can be met exactly
        bits=bits,
        calibration_tokens=1024,
        fit_steps=60,
        progress=False,
    )
    facts = read_manifest(flash).layers[0].predictor
    assert 0.1 < facts.active_share < 0.6 and facts.recall > 0.9
    model = stream(flash, 100)
    cache = make_prompt_cache(model)
    model(mx.array([[5, 6, 7, 8, 9, 10]]), cache=cache)
    stats = model.flash.stats
    assert stats.predictor_recall > 0.8
    asked = stats.hits + stats.misses
    model(mx.array([[11]]), cache=cache)
    now = stats.hits + stats.misses - asked
    assert 0 < now < 0.9 * 2 * 128  # fewer than all of two layers
    model.flash.close()


@pytest.mark.parametrize("bits", [4, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["relu2 llama, biases", "nemotron"])
def test_an_order_by_use_is_the_same_model(tmp_path, name, bits):
    """Rows, columns, biases and the predictor's outputs are moved together."""
    checkpoint = write_checkpoint(tmp_path / "model", KINDS[name])
    options = dict(
        unit="neuron", rank=64, calibration_tokens=512, fit_steps=30, bits=bits
    )
    placed, plain = (
        mlx_flash.convert(
            checkpoint, tmp_path / order, order=order, progress=False, **options
        )
        for order in ("coactivation", "checkpoint")
    )
    packing = bits and {"bits": bits, "group_size": 64, "mode": "affine"}
    assert_parity(placed, resident(checkpoint, packing), tolerance=1e-5)
    for folder, order in ((placed, "coactivation"), (plain, "checkpoint")):
        assert {layer.order for layer in read_manifest(folder).layers} == {order}
    models = [stream(folder, 100) for folder in (placed, plain)]
    caches = [make_prompt_cache(model) for model in models]
    for token in (5, 9, 17):  # one by one: the predictors choose
        a, b = (
            model(mx.array([[token]]), cache=cache)
            for model, cache in zip(models, caches, strict=True)
        )
        assert (mx.abs(a - b).max() / mx.abs(b).max()).item() < 1e-5
    asked = [model.flash.stats.asked for model in models]
    assert asked[0] == asked[1] < 3 * 2 * 128
    for model in models:
        model.flash.close()


def test_a_smooth_activation_becomes_blocks(tmp_path, capsys):
    config = KINDS["nanochat"] | {
        "model_type": "persimmon",
        "hidden_act": "gelu",
        "num_key_value_heads": 4,
    }
    checkpoint = write_checkpoint(tmp_path / "model", config)
    flash = mlx_flash.convert(checkpoint, tmp_path / "flash")
    said = capsys.readouterr().err
    assert "'gelu', which never gives exact zeros" in said and "blocks" in said
    assert read_manifest(flash).unit == "block"
    reference, tokens = resident(checkpoint), mx.array([[4, 5, 6]])
    with mlx_flash.load_model(flash, "1GB") as (model, _):
        diff = mx.abs(model(tokens) - reference(tokens)).max()
        assert diff.item() < 1e-5
    with pytest.raises(FlashError, match="gelu.*leave out --unit"):
        mlx_flash.convert(checkpoint, tmp_path / "other", unit="neuron")


def test_too_few_zeros_become_blocks_and_an_interruption_stays_with_that(
    tmp_path, capsys, monkeypatch
):
    checkpoint = write_checkpoint(tmp_path / "model", KINDS["relu llama"])
    options = {"rank": 8, "calibration_tokens": 256}
    real, done = conversion.write_bundles, []

    def once(path, *args):
        if done:
            raise KeyboardInterrupt
        done.append(path)
        return real(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_bundles", once)
        with pytest.raises(KeyboardInterrupt):
            mlx_flash.convert(checkpoint, tmp_path / "flash", **options)
    said = capsys.readouterr().err
    assert "active on calibration text" in said and "--unit neuron insists" in said
    flash = mlx_flash.convert(checkpoint, tmp_path / "flash", **options)
    assert "active on" not in capsys.readouterr().err
    assert read_manifest(flash).unit == "block"
    names = {p.name for layer in read_manifest(flash).layers for p in layer.parts}
    assert names == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}


def test_a_quantised_checkpoint_keeps_its_packing_in_blocks(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "model", KINDS["relu llama"])
    model = resident(checkpoint)
    quantize = {"group_size": 64, "bits": 4}
    nn.quantize(model, **quantize)
    packed = save(
        tmp_path / "packed",
        KINDS["relu llama"] | {"quantization": quantize},
        dict(tree_flatten(model.parameters())),
    )
    flash = mlx_flash.convert(packed, tmp_path / "flash", unit="block")
    assert "Its FFNs are quantised" not in capsys.readouterr().err
    assert read_manifest(flash).unit == "block"
    tokens = mx.array([[4, 5, 6]])
    expected = model(tokens)
    with mlx_flash.load_model(flash, "1GB") as (streamed, _):
        diff = mx.abs(streamed(tokens) - expected).max() / mx.abs(expected).max()
    assert diff.item() < 1e-5


@pytest.mark.parametrize("unit", ["neuron", "block"])
def test_resident_weights_in_their_own_width(tmp_path, unit):
    checkpoint = write_checkpoint(tmp_path / "model", KINDS["relu llama"])
    flash = mlx_flash.convert(
        checkpoint,
        tmp_path / "flash",
        unit=unit,
        rank=0,
        bits=4,
        resident_bits=8,
        progress=False,
    )
    config = json.loads((flash / "config.json").read_text())["quantization"]
    assert config["model.embed_tokens"]["bits"] == 8
    assert config["model.layers.0.self_attn.q_proj"]["bits"] == 8
    assert config["model.layers.0.mlp.gate_proj"]["bits"] == 4
    reference = resident(checkpoint)
    eight = {"group_size": 64, "bits": 8, "mode": "affine"}
    for path, module in reference.named_modules():
        if "mlp" not in path and hasattr(module, "to_quantized"):
            module.weight = mx.dequantize(*mx.quantize(module.weight, **eight), **eight)
    if unit == "neuron":
        four = eight | {"bits": 4}
        for layer in reference.layers:
            for name, rows in neuron_rows(layer.mlp).items():
                rows = mx.dequantize(*mx.quantize(rows, **four), **four)
                linear = layer.mlp[name]
                linear.weight = rows if name != "down_proj" else rows.T
        assert_parity(flash, reference, tolerance=1e-5)
    else:
        tokens = mx.array([[4, 5, 6]])
        with mlx_flash.load_model(flash, "1GB") as (model, _):
            assert np.isfinite(np.array(model(tokens))).all()


def test_the_source_is_deleted_only_after_a_sound_conversion(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "model", KINDS["relu llama"])
    options = {"rank": 0, "progress": False, "delete_source": True}

    def damaged(folder, passed):
        raise FlashError("differs")

    with monkeypatch.context() as patch:
        patch.setattr(converting, "verify", damaged)
        with pytest.raises(FlashError, match="differs"):
            mlx_flash.convert(checkpoint, tmp_path / "bad", **options)
    assert (checkpoint / "model.safetensors").exists()
    reference = resident(checkpoint)
    mx.eval(reference.parameters())
    flash = mlx_flash.convert(checkpoint, tmp_path / "flash", **options)
    assert sorted(p.name for p in checkpoint.iterdir()) == ["config.json"]
    assert_parity(flash, reference)
