"""Neurons whose gates stay in memory: exact without --skip, and with it as said."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as mlx_load_model
from stock_checkpoints import COMMON, LLAMA, make_weights, save, stream

import mlx_flash
from mlx_flash.layers.part import Share
from mlx_flash.layers.projections import neuron_rows
from mlx_flash.storage.manifest_reading import read_manifest

UNITS = 96
CONFIGS = {
    "llama": LLAMA,
    "llama, biases": LLAMA | {"mlp_bias": True},
    "qwen2": COMMON | {"model_type": "qwen2"},
    "gemma": COMMON | {"model_type": "gemma", "head_dim": 16},  # GeGLU
}
ACTIVATIONS = {"gemma": nn.gelu}
SLOTS = (1, 5, UNITS // 2, UNITS - 1, UNITS)  # the least, and all
PACKED = {"bits": 4, "group_size": 32, "mode": "affine"}
TOKENS = np.random.default_rng(0).integers(3, 90, (1, 23))


class Masked(nn.Module):
    """An FFN in memory that skips as the thresholds say: the slow truth."""

    def __init__(self, ffn, gains, threshold, activation):
        super().__init__()
        self.ffn, self._gains, self._threshold = ffn, gains, threshold
        self._activation = activation

    def __call__(self, x):
        gates = self._activation(self.ffn.gate_proj(x))
        heard = mx.abs(gates) * self._gains > self._threshold
        hidden = mx.where(heard, gates, 0)
        return self.ffn.down_proj(hidden * self.ffn.up_proj(x))


def in_memory(name, checkpoint, flash, share, packing=None):
    """The whole model with FFNs that skip `share`."""
    model, _ = mlx_load_model(checkpoint)
    manifest = read_manifest(flash)
    stored = mx.load(str(flash / "resident.safetensors"))
    for layer, entry in zip(model.layers, manifest.layers, strict=True):
        for key, rows in neuron_rows(layer.mlp).items() if packing else ():
            rows = mx.dequantize(*mx.quantize(rows, **packing), **packing)
            linear = layer.mlp[key]
            linear.weight = rows if rows.shape == linear.weight.shape else rows.T
        shares, found = manifest.skipping.shares, entry.thresholds
        threshold = float(np.interp(share, shares, found)) if share else -1.0
        gains = stored[f"{entry.module}.gains"]
        assert np.ptp(np.array(gains.astype(mx.float32))) > 0
        layer.mlp = Masked(layer.mlp, gains, threshold, ACTIVATIONS.get(name, nn.silu))
    return model


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(name, …) → (checkpoint, flash folder). Not to be changed."""
    made = {}

    def folders(name, **options):
        key = (name, *sorted(options.items()))
        if key not in made:
            base = tmp_path_factory.mktemp("gated")
            weights = dict(tree_flatten(make_weights(CONFIGS[name]).parameters()))
            checkpoint = save(base / "checkpoint", CONFIGS[name], weights)
            flash = mlx_flash.convert(
                checkpoint,
                base / "flash",
                skippable=True,
                calibration_tokens=512,
                progress=False,
                **options,
            )
            made[key] = checkpoint, flash
        return made[key]

    return folders


def read_in(model, chunks):
    """Logits of TOKENS read in chunks of so many, and the cache's length."""
    cache, done, found = make_prompt_cache(model), 0, []
    for count in chunks:
        found.append(model(mx.array(TOKENS[:, done : done + count]), cache=cache))
        mx.eval(found[-1])
        done += count
    assert done == TOKENS.shape[1]
    return mx.concatenate(found, axis=1)


def difference(actual, expected):
    return (mx.abs(actual - expected).max() / mx.abs(expected).max()).item()


@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_computed_depends_on_neither_memory_nor_chunks(make, name, share):
    checkpoint, flash = make(name)
    manifest = read_manifest(flash)
    assert manifest.unit == "gated neuron"
    parts = [part.name for part in manifest.layers[0].parts]
    assert parts == ["up_proj.weight", "down_proj.weight"]
    reference = in_memory(name, checkpoint, flash, share)
    expected = read_in(reference, [23])
    if share is None:
        plain = read_in(mlx_load_model(checkpoint)[0], [23])
        assert difference(expected, plain) < 1e-5
    for slots in SLOTS:
        model = stream(flash, slots, skip=share)
        for chunks in ([23], [20, 1, 1, 1], [9, 3, 2, 9], [1] * 23):
            diff = difference(read_in(model, chunks), expected)
            assert diff < 1e-5, (slots, chunks, diff)
        assert (model.flash.stats.misses > 0) == (slots < UNITS)
        model.flash.close()


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_share_is_about_what_is_left_out(make, share):
    checkpoint, flash = make("llama")
    model = stream(flash, UNITS - 1, skip=share)
    plain = mlx_load_model(checkpoint)[0]
    actual = read_in(model, [1] * 23)
    asked = model.flash.stats.asked / (23 * 2 * UNITS)
    assert abs(asked - (1 - share)) < 0.1
    assert difference(actual, read_in(plain, [23])) > 1e-3  # it is lossy
    model.flash.close()


@pytest.mark.parametrize("share", [None, 0.4])
def test_quantised_as_a_whole(make, share):
    checkpoint, flash = make("llama", **PACKED)
    names = json.loads((flash / "config.json").read_text())["quantization"]
    assert names["model.layers.1.mlp.gate_proj"] == PACKED
    reference = in_memory("llama", checkpoint, flash, share, PACKED)
    expected = read_in(reference, [23])
    for slots in SLOTS:
        model = stream(flash, slots, skip=share)
        assert difference(read_in(model, [20, 1, 1, 1]), expected) < 1e-5
        model.flash.close()


@pytest.mark.parametrize("share", [None, 0.4])
def test_gates_are_quantised_as_what_is_resident(make, share):
    checkpoint, flash = make("llama", resident_bits=8)

    def resident(path, module):
        return hasattr(module, "to_quantized") and not path.endswith(
            ("up_proj", "down_proj")
        )

    reference = in_memory("llama", checkpoint, flash, share)
    nn.quantize(reference, group_size=64, bits=8, class_predicate=resident)
    expected = read_in(reference, [23])
    for slots in (5, UNITS):
        model = stream(flash, slots, skip=share)
        assert difference(read_in(model, [20, 1, 1, 1]), expected) < 1e-5
        model.flash.close()


@pytest.mark.parametrize("share", [None, 0.5])
def test_half_precision(tmp_path, share):
    weights = dict(tree_flatten(make_weights(LLAMA, dtype=mx.float16).parameters()))
    checkpoint = save(tmp_path / "half", LLAMA, weights)
    flash = mlx_flash.convert(
        checkpoint,
        tmp_path / "flash",
        skippable=True,
        calibration_tokens=256,
        progress=False,
    )
    expected = read_in(in_memory("llama", checkpoint, flash, share), [23])
    for slots in (5, UNITS):
        model = stream(flash, slots, skip=share)
        # Rounded gates lie on the other side of a threshold now and then.
        tolerance = 5e-2 if share else 5e-3
        assert difference(read_in(model, [20, 1, 1, 1]), expected) < tolerance
        model.flash.close()


def test_machines_add_up_what_one_computes(make):
    """Each machine's share of the units, skipped by gates that all of them have."""
    _, flash = make("llama, biases")
    x = mx.random.normal((3, 64), key=mx.random.key(4))
    whole = stream(flash, UNITS, skip=0.5)
    ffn = whole.flash.layers[0]
    expected = ffn(x)
    known = ffn.known(x)
    assert 0 < int((known["gate_proj"] != 0).sum()) < 3 * UNITS
    parts = dict(ffn.slots.parts)
    total = mx.zeros_like(x)
    for first in (0, 1):
        units = np.arange(first, UNITS, 2)
        ffn.part = Share(units, UNITS, lambda y: y)
        total = total + ffn.compute(
            x,
            {name: array[mx.array(units)] for name, array in parts.items()},
            neurons=ffn.neurons_of(np.arange(len(units))),
            known=known,
        )
    total = total + ffn.down_proj.bias
    assert mx.abs(total - expected).max().item() < 1e-5
    whole.flash.close()
