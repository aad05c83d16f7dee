"""Dense FFNs in blocks give what mlx-lm gives with all of them in memory."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import phi3
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as mlx_load_model
from stock_checkpoints import LLAMA, stream, write_checkpoint

import mlx_flash
from mlx_flash.errors import FlashError
from mlx_flash.layers import block
from mlx_flash.storage.manifest_reading import read_manifest

CONFIG = LLAMA | {"intermediate_size": 256, "mlp_bias": True}
FUSED = CONFIG | {"model_type": "phi3"}  # gate_up_proj: all gate rows, then all up rows
TOKENS = mx.array([[1, 2, 3, 4, 5]])
GEMMA_3N = {
    "model_type": "gemma3n_text",
    "head_dim": 16,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 97,
    "sliding_window": 16,
    "rope_local_base_freq": 1e4,
    "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.95, 0.0],
    "hidden_size_per_layer_input": 32,
    "altup_num_inputs": 2,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 16,
}
KINDS = [
    (CONFIG, None),
    (CONFIG, {"group_size": 32, "bits": 4}),
    (CONFIG, {"group_size": 64, "bits": 3}),
    (CONFIG, {"group_size": 32, "bits": 8}),
    (CONFIG, {"group_size": 32, "bits": 4, "mode": "mxfp4"}),
    (FUSED, None),
    (FUSED, {"group_size": 32, "bits": 4}),
]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]['model_type']}, {kind[1]}")
def folders(request, tmp_path, monkeypatch):
    """A tiny checkpoint, and its flash folder of four or eight blocks a layer."""
    monkeypatch.setattr(block, "BLOCK_BYTES", 8_000)
    checkpoint = write_checkpoint(tmp_path / "stock", *request.param)
    flash = mlx_flash.convert(checkpoint, tmp_path / "flash", progress=False)
    return checkpoint, flash


def test_logits_equal_the_resident_model(folders):
    checkpoint, flash = folders
    resident, _ = mlx_load_model(checkpoint)
    manifest = read_manifest(flash)
    units = manifest.layers[0].units
    assert manifest.unit == "block" and units >= 4
    tokens = mx.array(np.random.default_rng(0).integers(0, 90, (2, 20)))
    expected = resident(tokens)
    for slots in sorted({1, units // 2, units - 1, units}):
        model = stream(flash, slots)
        diff = mx.abs(model(tokens) - expected).max() / mx.abs(expected).max()
        assert diff.item() < 1e-5, slots
        cache, plain = make_prompt_cache(model), make_prompt_cache(resident)
        for token in range(3):
            one = mx.array([[token]])
            a, e = model(one, cache=cache), resident(one, cache=plain)
            assert mx.abs(a - e).max() / mx.abs(e).max() < 1e-5, slots
        assert (model.flash.stats.misses > 0) == (slots < units)
        model.flash.close()


def test_packed_weights_keep_their_bits(folders):
    checkpoint, flash = folders
    stored = mx.load(str(checkpoint / "model.safetensors"))
    layer = read_manifest(flash).layers[0]
    path = flash / layer.file
    raw = path.read_bytes()[layer.data_offset :]
    part = next(p for p in layer.parts if "up_proj.weight" in p.name)
    whole = np.array(stored[f"{layer.module}.{part.name}"].view(mx.uint8)).tobytes()
    starts = [u * layer.unit_bytes + part.offset for u in range(layer.units)]
    units = [raw[s : s + part.bytes] for s in starts]
    if part.name.startswith("gate_up"):
        half = part.bytes // 2
        units = [u[:half] for u in units] + [u[half:] for u in units]
    assert b"".join(units) == whole


def test_block_sizes():
    assert block.block_size(14336, 24576, 1, 2_000_000) == 64
    assert block.block_size(14336, 24576, 64, 2_000_000) == 64
    assert block.block_size(256, 1e9, 32, 2_000_000) == 32
    assert block.block_size(256, 1, 1, 2_000_000) == 256
    with pytest.raises(FlashError, match="cannot be cut into groups of 64"):
        block.block_size(96, 1, 64, 2_000_000)


def test_quantising_while_converting(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "stock", CONFIG)
    flash = mlx_flash.convert(
        checkpoint, tmp_path / "flash", bits=4, group_size=32, progress=False
    )
    resident, _ = mlx_load_model(checkpoint)
    nn.quantize(
        resident,
        group_size=32,
        bits=4,
        class_predicate=lambda path, m: "mlp" in path and hasattr(m, "to_quantized"),
    )
    tokens = mx.array([[1, 2, 3, 4, 5]])
    expected = resident(tokens)
    with mlx_flash.load_model(flash, "auto") as (model, _):
        diff = mx.abs(model(tokens) - expected).max() / mx.abs(expected).max()
        assert diff.item() < 1e-5


def test_closing_gives_the_slots_back(folders):
    _, flash = folders
    model = stream(flash, read_manifest(flash).layers[0].units)
    mx.eval(model(mx.array([[1, 2, 3]])))
    stores = [layer.slots for layer in model.flash.layers]
    slots = sum(a.nbytes for store in stores for a in store.parts.values())
    held = mx.get_active_memory()
    del stores
    model.flash.close()
    assert held - mx.get_active_memory() >= slots
    with pytest.raises(FlashError, match="closed"):
        model(mx.array([[1]]))


@pytest.mark.parametrize("name", ["apertus", "gemma3n"])
def test_activations_of_their_own(tmp_path, monkeypatch, name):
    """Scalars in the activation; a layer that keeps what is above the mean of all."""
    configs = {
        "apertus": CONFIG
        | {"post_norm": False, "qk_norm": True, "attention_bias": False},
        "gemma3n": {"text_config": CONFIG | GEMMA_3N},
    }
    monkeypatch.setattr(block, "BLOCK_BYTES", 8_000)
    config = configs[name] | {"model_type": name}
    checkpoint = write_checkpoint(tmp_path / "stock", config)
    flash = mlx_flash.convert(checkpoint, tmp_path / "flash", progress=False)
    layers = [layer.module[-12:] for layer in read_manifest(flash).layers]
    expected = (
        ["layers.1.mlp"] if name == "gemma3n" else ["layers.0.mlp", "layers.1.mlp"]
    )
    assert layers == expected
    resident, _ = mlx_load_model(checkpoint)
    tokens = mx.array([[1, 2, 3, 4, 5]])
    expected = resident(tokens)
    model = stream(flash, 2)
    diff = mx.abs(model(tokens) - expected).max() / mx.abs(expected).max()
    assert diff.item() < 1e-5
    model.flash.close()


def test_fused_projections_with_zeros_become_blocks_where_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(phi3, "swiglu", lambda gate, x: nn.relu(gate) * x)
    checkpoint = write_checkpoint(tmp_path / "stock", FUSED)
    flash = mlx_flash.convert(checkpoint, tmp_path / "flash", unit="block")
    assert read_manifest(flash).unit == "block"
    expected = mlx_load_model(checkpoint)[0](TOKENS)
    model = stream(flash, 2)
    diff = mx.abs(model(TOKENS) - expected).max() / mx.abs(expected).max()
    assert diff.item() < 1e-5
    model.flash.close()


def test_bundles_of_another_shape_are_seen(folders):
    _, flash = folders
    config = json.loads((flash / "config.json").read_text())
    config["intermediate_size"] *= 2
    (flash / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlashError, match="disagree about its blocks"):
        mlx_flash.load_model(flash, "1GB")
