"""Slot numbers reach MLX in the type that its kernels take, uint32.

Of any other type `gather_mm` and `gather_qmm` make a copy first: a kernel more for each
projection of each layer.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_flash.converters.bundles import write_bundles
from mlx_flash.layers.expert import ExpertFFN, switch_parts
from mlx_flash.memory.fence import Fence
from mlx_flash.memory.policies import Lru
from mlx_flash.memory.slots import UnitSlots
from mlx_flash.memory.stats import Stats
from mlx_flash.storage.reader import open_reader
from mlx_flash.storage.source import bundle_extent

UNITS, DIMS, TOP_K = 8, 64, 2


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("n_slots", [2, 4])
def test_experts(tokens, n_slots, tmp_path, monkeypatch):
    switch = SwitchGLU(DIMS, 96, UNITS)
    nn.quantize(switch, group_size=32, bits=4)
    (tmp_path / "ffn").mkdir()
    layer = write_bundles(tmp_path / "ffn" / "l", "mlp", switch_parts(switch))
    seen, original = [], mx.gather_qmm

    def note(*args, rhs_indices, **options):
        seen.append(rhs_indices.dtype)
        return original(*args, rhs_indices=rhs_indices, **options)

    monkeypatch.setattr(mx, "gather_qmm", note)
    ffn = ExpertFFN(switch)
    with open_reader(2, direct=False) as reader:
        extents = [bundle_extent(layer, tmp_path)]
        slots = UnitSlots(layer, extents, n_slots, Lru(), reader, Fence(), Stats())
        ffn.attach(slots)
        ids = np.random.default_rng(0).integers(0, UNITS, (tokens, TOP_K))
        mx.eval(ffn(mx.zeros((tokens, DIMS)), mx.array(ids, mx.uint32)))
    assert seen and set(seen) == {mx.uint32}


def test_neurons(bench, monkeypatch):
    """Few of many slots, so that rows are gathered by number."""

    def first_six(x):
        return mx.broadcast_to(mx.arange(bench.UNITS) < 6, (len(x), bench.UNITS))

    ffn = bench.ffn(20, first_six)
    seen, original = [], ffn.compute

    def note(x, parts, rows, *rest):
        seen.append(rows.dtype)
        return original(x, parts, rows, *rest)

    monkeypatch.setattr(ffn, "compute", note, raising=False)
    mx.eval(ffn(bench.inputs(1)))
    bench.close()
    assert seen == [mx.uint32]
