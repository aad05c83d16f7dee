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
from mlx_flash.storage.extents import bundle_extent
from mlx_flash.storage.reader import open_reader

UNITS, DIMS, TOP_K = 8, 64, 2
MANY = 32  # experts: mlx-lm sorts before there are four pairs for each of them


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


def kernel(pairs, experts, is_sorted):
    """What `GatherQMM::eval_gpu` of MLX 0.32 chooses by, for one row a pair."""
    return pairs >= 16 and is_sorted and pairs // experts >= 4


@pytest.mark.parametrize("tokens", [1, 5, 31, 32, 40, 63, 64, 200])
@pytest.mark.parametrize("n_slots", [1, 4, 15, 31, MANY])
@pytest.mark.parametrize("batch_tokens", [8, 64])
def test_a_gpu_takes_the_kernel_that_it_takes_for_all_experts(
    tokens, n_slots, batch_tokens, tmp_path, monkeypatch
):
    """Every call of a prompt, whatever its waves and batches, as mlx-lm's one call."""
    switch = SwitchGLU(DIMS, 96, MANY)
    nn.quantize(switch, group_size=32, bits=4)
    (tmp_path / "ffn").mkdir()
    layer = write_bundles(tmp_path / "ffn" / "l", "mlp", switch_parts(switch))
    seen, original = [], mx.gather_qmm

    def note(x, w, *args, rhs_indices, sorted_indices=False, **options):
        seen.append((rhs_indices.size, len(w), sorted_indices))
        options |= {"rhs_indices": rhs_indices, "sorted_indices": sorted_indices}
        return original(x, w, *args, **options)

    ids = np.random.default_rng(0).integers(0, MANY, (tokens, TOP_K))
    ids = mx.array(ids, mx.uint32)
    x = mx.random.normal((tokens, DIMS))
    monkeypatch.setattr(mx, "gather_qmm", note)
    expected = switch(x, ids)
    (wanted,) = {kernel(*call) for call in seen}
    seen.clear()
    ffn = ExpertFFN(switch)
    with open_reader(2, direct=False) as reader:
        extents = [bundle_extent(layer, tmp_path)]
        slots = UnitSlots(layer, extents, n_slots, Lru(), reader, Fence(), Stats())
        if n_slots == MANY:
            slots.read_all()
        ffn.attach(slots, batch_tokens)
        with monkeypatch.context() as patch:
            patch.setattr(mx, "default_device", lambda: mx.gpu)
            result = ffn(x, ids)
        assert mx.array_equal(result, expected)
    assert {kernel(*call) for call in seen} == {wanted}


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
