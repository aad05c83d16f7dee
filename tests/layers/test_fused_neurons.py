"""Gates and ups in one projection as neurons, against the whole model in memory."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import phi3
from stock_checkpoints import COMMON
from test_neuron_kinds import assert_parity, resident, stream, write_checkpoint

import mlx_flash
from mlx_flash.layers.kinds import NEURON
from mlx_flash.layers.projections import (
    by_neuron,
    deciding_rows,
    from_neurons,
    neuron_parts,
    neuron_rows,
)
from mlx_flash.storage.manifest_reading import read_manifest

CONFIG = COMMON | {"model_type": "phi3", "intermediate_size": 128}
N, D = 128, 64


class Halves(nn.Module):
    """All gates first, then all ups, with biases that no model of mlx-lm has."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.gate_up_proj = nn.Linear(dim, 2 * hidden_dim, bias=True)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=True)

    def __call__(self, x):
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(nn.relu(gate) * up)


class Pairs(nn.Module):
    """A gate, its up, the next gate: as in Phi-3-small."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.up_proj = nn.Linear(dim, 2 * hidden_dim, bias=True)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=True)

    def __call__(self, x):
        h = self.up_proj(x)
        return self.down_proj(nn.relu(h[..., ::2]) * h[..., 1::2])


@pytest.fixture(params=[None, Halves, Pairs], ids=["phi3", "halves", "pairs"])
def checkpoint(request, tmp_path, monkeypatch):
    if request.param is None:
        monkeypatch.setattr(phi3, "swiglu", lambda gate, x: nn.relu(gate) * x)
    else:
        monkeypatch.setattr(phi3, "MLP", request.param)
    return write_checkpoint(tmp_path / "model", CONFIG)


def test_fused_projections_become_neurons(checkpoint, tmp_path, capsys):
    flash = mlx_flash.convert(checkpoint, tmp_path / "flash", rank=0)
    manifest = read_manifest(flash)
    assert (manifest.unit, manifest.layers[0].units) == ("neuron", N)
    assert "gives exact zeros" in capsys.readouterr().err
    assert manifest.layers[0].unit_bytes >= 3 * D * 4
    assert_parity(flash, resident(checkpoint))


@pytest.mark.parametrize("bits, group_size", [(4, 64), (8, 32)])
def test_quantised_along_the_models_width(checkpoint, tmp_path, bits, group_size):
    flash = mlx_flash.convert(
        checkpoint,
        tmp_path / "flash",
        rank=0,
        progress=False,
        bits=bits,
        group_size=group_size,
    )
    packing = {"bits": bits, "group_size": group_size, "mode": "affine"}
    reference = resident(checkpoint)
    for layer in reference.layers:
        for name, rows in neuron_rows(layer.mlp).items():
            rows = mx.dequantize(*mx.quantize(rows, **packing), **packing)
            whole = (
                rows.T if name == "down_proj" else from_neurons(layer.mlp, name, rows)
            )
            layer.mlp[name].weight = whole
    assert_parity(flash, reference, tolerance=1e-5)


def test_a_predictor_is_fitted_to_the_gates(checkpoint, tmp_path):
    flash = mlx_flash.convert(
        checkpoint,
        tmp_path / "flash",
        unit="neuron",
        rank=64,
        calibration_tokens=1024,
        fit_steps=60,
        progress=False,
    )
    manifest = read_manifest(flash)
    assert manifest.layers[0].order == "coactivation"
    assert manifest.layers[0].predictor.recall > 0.9
    assert_parity(flash, resident(checkpoint))  # without it, in the order of use
    model = stream(flash, 100)
    logits = np.array(model(mx.array([[5]])))
    assert np.isfinite(logits).all() and model.flash.stats.misses < 2 * N
    model.flash.close()


@pytest.mark.parametrize("made", [Halves, Pairs])
def test_what_belongs_to_a_neuron(made):
    ffn = made(D, N)
    ffn.update(
        {k: {"bias": mx.random.normal(v.bias.shape)} for k, v in ffn.children().items()}
    )
    ((name, linear), (_, down)) = ffn.children().items()
    rows = by_neuron(ffn, name, linear.weight)
    wanted = mx.array([3, N + 3] if made is Halves else [6, 7])
    assert mx.array_equal(rows[3].reshape(2, D), linear.weight[wanted])
    bias = by_neuron(ffn, name, linear.bias)
    assert mx.array_equal(bias[3].reshape(2), linear.bias[wanted])
    for array in (linear.weight, linear.bias):
        assert mx.array_equal(
            from_neurons(ffn, name, by_neuron(ffn, name, array)), array
        )
    weight, bias = deciding_rows(ffn)
    assert weight.shape == (N, D) and mx.array_equal(
        weight[3], linear.weight[wanted[0]]
    )
    assert mx.array_equal(bias[3], linear.bias[wanted[0]])
    parts = neuron_parts(ffn)
    shapes = {k: (a.dtype, a.shape) for k, a in parts.items()}
    expected = NEURON.parts(ffn, N, mx.float32)
    assert shapes == {k: (a.dtype, a.shape) for k, a in expected.items()}
    assert mx.array_equal(parts["down_proj.weight"], down.weight.T)
