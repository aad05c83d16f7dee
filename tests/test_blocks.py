"""Dense FFNs in blocks give what mlx-lm gives with all of them in memory."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_flash.converters import blocks
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as mlx_load_model
from moe import LLAMA, stream, write_checkpoint

import mlx_flash
from mlx_flash.errors import FlashError
from mlx_flash.format import read_manifest

CONFIG = LLAMA | {"intermediate_size": 256, "mlp_bias": True}
PACKINGS = [
    None,
    {"group_size": 32, "bits": 4},
    {"group_size": 64, "bits": 3},
    {"group_size": 32, "bits": 8},
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
]


@pytest.fixture(params=PACKINGS, ids=str)
def folders(request, tmp_path, monkeypatch):
    """A tiny checkpoint, and its flash folder of four or eight blocks a layer."""
    monkeypatch.setattr(blocks, "UNIT_BYTES", 8_000)
    checkpoint = write_checkpoint(tmp_path / "stock", CONFIG, request.param)
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
    name = "up_proj.weight"
    part = next(p for p in layer.parts if p.name == name)
    whole = np.array(stored[f"{layer.module}.{name}"].view(mx.uint8)).tobytes()
    starts = [u * layer.unit_bytes + part.offset for u in range(layer.units)]
    assert b"".join(raw[s : s + part.bytes] for s in starts) == whole


def test_block_sizes():
    assert blocks.block_size(14336, 24576, 1, 2_000_000) == 64
    assert blocks.block_size(14336, 24576, 64, 2_000_000) == 64
    assert blocks.block_size(256, 1e9, 32, 2_000_000) == 32
    assert blocks.block_size(256, 1, 1, 2_000_000) == 256
    with pytest.raises(FlashError, match="cannot be cut into groups of 64"):
        blocks.block_size(96, 1, 64, 2_000_000)


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
    stores = [layer.store for layer in model.flash.layers]
    slots = sum(a.nbytes for store in stores for a in store.parts.values())
    held = mx.get_active_memory()
    del stores
    model.flash.close()
    assert held - mx.get_active_memory() >= slots
    with pytest.raises(FlashError, match="closed"):
        model(mx.array([[1]]))
