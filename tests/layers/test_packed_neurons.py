"""ReLU models that mlx-lm quantised as neurons, against the model with their values."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from stock_checkpoints import COMMON, save
from test_neuron_kinds import KINDS, assert_parity, resident, stream, write_checkpoint

import mlx_flash
from mlx_flash.assembly import assemble
from mlx_flash.errors import FlashError
from mlx_flash.planning.outline import outline
from mlx_flash.storage.manifest_reading import read_manifest

FOUR = {"group_size": 64, "bits": 4, "mode": "affine"}
PACKINGS = [
    FOUR,
    {"group_size": 32, "bits": 8, "mode": "affine"},
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
]
NAMES = ["prosparse", "nemotron", "relu2 llama, biases"]


def through(weight, how):
    """The values that a weight has once it was packed."""
    packed = mx.quantize(weight, **how)
    biases = packed[2] if len(packed) > 2 else None
    return mx.dequantize(*packed[:2], biases, **how).astype(weight.dtype)


def write_packed(folder, name, how):
    """(checkpoint as mlx-lm quantises it, the model with its values in floats)"""
    source = write_checkpoint(folder / "source", KINDS[name])
    packed, floats = resident(source), resident(source)
    nn.quantize(packed, **how)
    for _, module in floats.named_modules():
        if hasattr(module, "to_quantized"):
            module.weight = through(module.weight, how)
    config = KINDS[name] | {"quantization": how, "quantization_config": how}
    weights = dict(tree_flatten(packed.parameters()))
    return save(folder / "packed", config, weights), floats


def packed_anew(floats, how):
    """The same model, its ways out with the values of rows packed along the width."""
    for layer in floats.layers:
        down = layer.mlp["down_proj"]
        down.weight = through(down.weight.T, how).T
    return floats


@pytest.mark.parametrize("how", PACKINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_bundles_keep_bits_and_groups(tmp_path, capsys, name, how):
    checkpoint, floats = write_packed(tmp_path, name, how)
    flash = mlx_flash.convert(checkpoint, tmp_path / "flash", rank=0)
    said = capsys.readouterr().err
    assert "quantised anew along the width, which is not the same to the bit" in said
    assert read_manifest(flash).unit == "neuron"
    config = json.loads((flash / "config.json").read_text())["quantization"]
    packed = config["model.layers.1.mlp.down_proj"], config["model.embed_tokens"]
    assert packed == (how, how)
    assert_parity(flash, packed_anew(floats, how), tolerance=1e-5)


def test_ways_into_the_neurons_are_the_same_to_the_bit(tmp_path):
    checkpoint, _ = write_packed(tmp_path, "prosparse", FOUR)
    stored = mx.load(str(checkpoint / "model.safetensors"))
    flash = mlx_flash.convert(checkpoint, tmp_path / "flash", rank=0, progress=False)
    model = stream(flash, 128)
    for name in ("gate_proj", "up_proj"):
        for key in ("weight", "scales", "biases"):
            mine = model.flash.layers[1].slots.parts[f"{name}.{key}"]
            assert mx.array_equal(mine, stored[f"model.layers.1.mlp.{name}.{key}"])
    resident_weights = mx.load(str(flash / "resident.safetensors"))
    for key in ("weight", "scales", "biases"):
        name = f"model.layers.0.self_attn.q_proj.{key}"
        assert mx.array_equal(resident_weights[name], stored[name])
    model.flash.close()


def test_a_dtype_keeps_all_values(tmp_path, capsys):
    checkpoint, floats = write_packed(tmp_path, "nemotron", FOUR)
    flash = mlx_flash.convert(checkpoint, tmp_path / "flash", rank=0, dtype="float32")
    said = capsys.readouterr().err
    assert "are unpacked for the bundles" in said and "anew" not in said
    config = json.loads((flash / "config.json").read_text())["quantization"]
    assert "model.layers.1.mlp.down_proj" not in config
    assert config["model.layers.1.self_attn.q_proj"] == FOUR
    assert {p.dtype for p in read_manifest(flash).layers[0].parts} == {"float32"}
    assert_parity(flash, floats, tolerance=1e-5)


def test_bits_that_are_asked_for(tmp_path):
    checkpoint, floats = write_packed(tmp_path, "prosparse", FOUR)
    eight = FOUR | {"bits": 8}
    flash = mlx_flash.convert(
        checkpoint, tmp_path / "flash", rank=0, bits=8, progress=False
    )
    for layer in floats.layers:
        for name in ("gate_proj", "up_proj"):
            layer.mlp[name].weight = through(layer.mlp[name].weight, eight)
    assert_parity(flash, packed_anew(floats, eight), tolerance=1e-5)


def test_a_predictor_and_the_order_of_use(tmp_path):
    checkpoint, floats = write_packed(tmp_path, "relu2 llama, biases", FOUR)
    flash = mlx_flash.convert(
        checkpoint,
        tmp_path / "flash",
        unit="neuron",
        rank=64,
        calibration_tokens=1024,
        fit_steps=60,
        progress=False,
    )
    layer = read_manifest(flash).layers[0]
    assert layer.order == "coactivation" and layer.predictor.recall > 0.9
    assert_parity(flash, packed_anew(floats, FOUR), tolerance=1e-5)


def test_one_projection_in_floats(tmp_path):
    """mlx-lm packs each module as its config says, and some not at all."""
    source = write_checkpoint(tmp_path / "source", KINDS["nemotron"])
    packed, floats = resident(source), resident(source)
    eight = FOUR | {"bits": 8}
    named = {"model.layers.0.mlp.up_proj": eight, "model.layers.0.mlp.down_proj": False}

    def of(path, module):
        return hasattr(module, "to_quantized") and named.get(path, True)

    nn.quantize(packed, **FOUR, class_predicate=of)
    for path, module in floats.named_modules():
        how = of(path, module)
        if how:
            module.weight = through(module.weight, FOUR if how is True else how)
    down = floats.layers[1].mlp["down_proj"]
    down.weight = through(down.weight.T, FOUR).T
    config = KINDS["nemotron"] | {"quantization": FOUR | named}
    checkpoint = save(
        tmp_path / "packed", config, dict(tree_flatten(packed.parameters()))
    )
    flash = mlx_flash.convert(checkpoint, tmp_path / "flash", rank=0, progress=False)
    assert_parity(flash, floats, tolerance=1e-5)


def test_plans_have_the_sizes_of_the_conversion(tmp_path):
    checkpoint, _ = write_packed(tmp_path, "prosparse", FOUR)
    flash = mlx_flash.convert(checkpoint, tmp_path / "flash", rank=0, progress=False)
    planned, real = outline(checkpoint).manifest, assemble(flash, True).manifest
    assert planned.unit == real.unit == "neuron"
    assert planned.resident.bytes == real.resident.bytes
    for mine, layer in zip(planned.layers, real.layers, strict=True):
        assert [(p.name, p.bytes) for p in mine.parts] == [
            (p.name, p.bytes) for p in layer.parts
        ]
    assert planned.predictor_bytes > 0


def test_what_stays_is_not_quantised_again(tmp_path):
    checkpoint, _ = write_packed(tmp_path, "nemotron", FOUR)
    with pytest.raises(FlashError, match="--resident-bits would be ignored"):
        mlx_flash.convert(checkpoint, tmp_path / "flash", resident_bits=8, rank=0)


def test_neurons_of_another_quantisation_become_blocks(tmp_path, capsys):
    config = KINDS["nemotron"] | {"quantization_config": {"quant_method": "gptq"}}
    found = write_checkpoint(tmp_path / "model", KINDS["nemotron"])
    (found / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlashError, match=r"\(gptq\) that is not mlx-lm's own"):
        mlx_flash.convert(found, tmp_path / "flash", unit="neuron")


def test_widths_that_are_no_whole_groups(tmp_path):
    """The way out is packed across 128 neurons; the width of 96 has no such groups."""
    config = COMMON | KINDS["nemotron"] | {"hidden_size": 96, "head_dim": 24}
    source = write_checkpoint(tmp_path / "source", config)
    model = resident(source)
    how = FOUR | {"group_size": 128}
    out = lambda path, module: path.endswith("down_proj")  # noqa: E731
    nn.quantize(model, **how, class_predicate=out)
    weights = dict(tree_flatten(model.parameters()))
    packed = save(tmp_path / "packed", config | {"quantization": how}, weights)
    with pytest.raises(FlashError, match="width 96 cannot be cut.*Try --dtype"):
        mlx_flash.convert(packed, tmp_path / "flash", rank=0)
    flash = mlx_flash.convert(
        packed, tmp_path / "flash", rank=0, dtype="float32", progress=False
    )
    for layer in (reference := resident(source)).layers:
        down = layer.mlp["down_proj"]
        down.weight = through(down.weight, how)
    assert_parity(flash, reference, tolerance=1e-5)
    assert np.isfinite(np.array(reference(mx.array([[1]])))).all()


@pytest.mark.parametrize(
    "change, word",
    [
        ({"bits": 4}, "group_size"),
        ([4], "group_size"),
        (FOUR | {"bits": 9}, "config.json"),
        (FOUR | {"bits": 8}, "is not packed as config.json says"),
        (FOUR | {"mode": "none"}, "config.json"),
        (FOUR | {"group_size": "many"}, "config.json"),
    ],
)
def test_a_config_that_lies_about_the_packing(tmp_path, change, word):
    checkpoint, _ = write_packed(tmp_path, "nemotron", FOUR)
    file = checkpoint / "config.json"
    config = json.loads(file.read_text()) | {"quantization": change}
    file.write_text(json.dumps(config))
    with pytest.raises(FlashError, match=word):
        mlx_flash.convert(checkpoint, tmp_path / "flash", rank=0, progress=False)
    assert not (tmp_path / "flash").exists()
