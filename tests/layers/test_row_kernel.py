"""Rows multiplied where they lie: the kernel's own text runs, compiled as C++."""

import warnings

import gpu_emulator
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import FFN

from mlx_flash.layers import row_kernel
from mlx_flash.layers.neuron import NeuronFFN
from mlx_flash.layers.projections import pack
from mlx_flash.layers.row_kernel import Rows, rows_into, rows_out

# The kernel sums in float32, so what is left is how the result is rounded.
TOLERANCES = {mx.float32: 2e-6, mx.float16: 6e-4, mx.bfloat16: 5e-3}


def affine(bits, group):
    return {"bits": bits, "group_size": group, "mode": "affine"}


def make_rows(ids, width, dtype=mx.float32, packing=None, n=11):
    weight = mx.random.normal((n, width), key=mx.random.key(0)).astype(dtype)
    return Rows(pack(weight, packing), mx.array(ids, mx.uint32), packing)


def some_ids(count, n=11):
    """In no order, and some of them twice."""
    return np.random.default_rng(count).integers(0, n, count)


def draw(tokens, width, dtype, seed=1):
    return mx.random.normal((tokens, width), key=mx.random.key(seed)).astype(dtype)


def assert_right(product, x, rows, gathered):
    """Against float32; of the type that plain MLX gives."""
    actual = product(x, rows)
    assert actual.dtype == gathered(x, rows).dtype
    expected = gathered(x.astype(mx.float32), rows.in_float32())
    assert actual.shape == expected.shape
    diff = mx.abs(actual.astype(mx.float32) - expected).max() / mx.abs(expected).max()
    assert diff.item() < TOLERANCES[actual.dtype]


def assert_both_right(tokens, rows, dtype):
    x = draw(tokens, rows.width, dtype)
    h = draw(tokens, rows.ids.size, dtype, seed=2)
    assert_right(rows_into, x, rows, row_kernel.gathered_into)
    assert_right(rows_out, h, rows, row_kernel.gathered_out)


@pytest.fixture(scope="module")
def emulators(tmp_path_factory):
    if gpu_emulator.COMPILER is None:
        pytest.skip("no C++ compiler")
    return {
        dialect: gpu_emulator.Emulator(dialect, tmp_path_factory.mktemp(dialect))
        for dialect in ("metal", "cuda")
    }


@pytest.fixture(params=["metal", "cuda"])
def emulator(request, emulators, monkeypatch):
    """The kernels of one of MLX's two GPU backends, on the CPU."""
    emulator = emulators[request.param]
    monkeypatch.setattr(mx.fast, f"{request.param}_kernel", emulator)
    monkeypatch.setattr(row_kernel, "kernel_maker", lambda: emulator)
    emulator.calls.clear()
    return emulator


# Widths of floats: fewer than the lanes take at once, no multiple of what one takes,
# more than all of them take. Ids: fewer than a group of lanes computes, several groups
# and a rest, more than one thread adds up.
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("T, D, K", [(1, 37, 3), (5, 264, 70), (3, 520, 9)])
def test_numbers(emulator, dtype, T, D, K):
    assert_both_right(T, make_rows(some_ids(K), D, dtype), dtype)
    assert {call["name"] for call in emulator.calls[-2:]} == {
        "flash_rows_into",
        "flash_rows_out",
    }


@pytest.mark.parametrize(
    "bits, group, dtype",
    [
        (4, 32, mx.float16),
        (4, 64, mx.bfloat16),
        (4, 128, mx.float32),
        (8, 32, mx.bfloat16),
        (8, 64, mx.float16),
        (8, 64, mx.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "T, groups, K", [(1, 3, 5), pytest.param(4, 9, 66, marks=pytest.mark.slow)]
)
def test_packed(emulator, bits, group, dtype, T, groups, K):
    rows = make_rows(some_ids(K), groups * group, dtype, affine(bits, group))
    assert_both_right(T, rows, dtype)
    assert {call["name"] for call in emulator.calls[-2:]} == {
        "flash_rows_into_packed",
        "flash_rows_out_packed",
    }


def test_every_number_of_ids(emulator):
    """One compiled kernel serves all of them, in any order."""
    assert_both_right(2, make_rows([0], 64), mx.float32)
    compiled = len(list(emulator.folder.glob("*.cpp")))
    for ids in ([10], [10, 0], [3, 3, 3], range(11), range(10, -1, -1)):
        assert_both_right(2, make_rows(list(ids), 64), mx.float32)
    for count in (4, 5, 15, 16, 17, 63, 64, 65, 129):
        assert_both_right(2, make_rows(some_ids(count), 64), mx.float32)
    # Metal gives few values in another address space: a kernel of its own for each.
    most = 3 * 2 if emulator.dialect == "metal" else 0
    assert len(list(emulator.folder.glob("*.cpp"))) - compiled <= most


def test_kinds_of_numbers_may_differ(emulator):
    rows = make_rows(some_ids(5), 64, mx.float32, affine(4, 64))
    assert_both_right(2, rows, mx.float16)
    assert_both_right(2, make_rows(some_ids(5), 64, mx.bfloat16), mx.float32)


def test_what_is_not_asked_for_is_not_read(emulator):
    """A slot may hold anything before its unit has arrived."""
    rows = make_rows([7, 2, 2], 64)
    weight = mx.full((11, 64), float("nan"))
    weight[mx.array([2, 7])] = rows.arrays["weight"][mx.array([2, 7])]
    assert_both_right(1, Rows({"weight": weight}, rows.ids), mx.float32)


def test_the_kernel_is_called_as_mlx_wants_it(emulator):
    rows = make_rows(some_ids(70), 4096, mx.float16, affine(4, 64))
    row_kernel._agrees.cache_clear()
    assert rows_into(draw(3, 4096, mx.float16), rows).shape == (3, 70)
    assert rows_out(draw(3, 70, mx.float16), rows).shape == (3, 4096)
    into, out = emulator.calls[-2:]
    sizes = {"TOKENS": 3, "D": 4096, "RUN": 8, "BITS": 4, "GROUP": 64}
    shared = {
        "shapes": [(3, 4096), (11, 512), (11, 64), (11, 64), (70,)],
        "dtypes": [mx.float16, mx.uint32, mx.float16, mx.float16, mx.uint32],
    }
    assert into == shared | {
        "name": "flash_rows_into_packed",
        "output_shapes": [(3, 70)],
        "output_dtypes": [mx.float16],
        "grid": (32, 18, 1),  # 32 lanes for each four ids
        "threadgroup": (32, 4, 1),
        "template": sizes | {"OUTPUTS": 4, "Number": mx.float16},
    }
    shared["shapes"][0] = (3, 70)
    assert out == shared | {
        "name": "flash_rows_out_packed",
        "output_shapes": [(2, 3, 4096)],  # a sum of 64 ids, and one of 6
        "output_dtypes": [mx.float32],
        "grid": (512, 2, 1),  # a thread for each eight columns
        "threadgroup": (128, 1, 1),
        "template": sizes | {"SPLIT": 64},
    }
    names = ("x", "weight", "scales", "biases", "ids")
    assert ("flash_rows_into_packed", names, ("out",)) in emulator.makes
    assert ("flash_rows_out_packed", names, ("out",)) in emulator.makes


@pytest.mark.parametrize(
    "tokens, ids, packing",
    [
        (9, [1, 2], None),
        (2, [], None),
        (2, [1, 2], affine(3, 64)),
        (2, [1, 2], {"bits": 4, "group_size": 32, "mode": "mxfp4"}),
    ],
)
def test_what_the_kernel_does_not_take_is_gathered(emulator, tokens, ids, packing):
    rows = make_rows(ids, 64, packing=packing)
    x, h = draw(tokens, 64, mx.float32), mx.ones((tokens, len(ids)))
    assert mx.array_equal(rows_into(x, rows), row_kernel.gathered_into(x, rows))
    assert mx.array_equal(rows_out(h, rows), row_kernel.gathered_out(h, rows))
    assert emulator.calls == []


def test_without_a_gpu_rows_are_gathered():
    if row_kernel.kernel_maker() is not None:
        pytest.skip("there is a GPU")
    rows = make_rows([5, 1, 5], 64, mx.float16)
    x, h = draw(2, 64, mx.float16), draw(2, 3, mx.float16)
    weight = rows.arrays["weight"][rows.ids]
    assert mx.array_equal(rows_into(x, rows), x @ weight.T)
    assert mx.array_equal(rows_out(h, rows), h @ weight)


def refuses(**_):
    def kernel(**_):
        raise RuntimeError("unknown type name")

    return kernel


def gives_zeros(**_):
    def kernel(*, output_shapes, output_dtypes, **_):
        return [mx.zeros(output_shapes[0], output_dtypes[0])]

    return kernel


def gives_nan(**_):
    def kernel(*, output_shapes, output_dtypes, **_):
        return [mx.full(output_shapes[0], float("nan"), output_dtypes[0])]

    return kernel


@pytest.mark.parametrize(
    "make, problem",
    [
        (refuses, "unknown type name"),
        (gives_zeros, "wrong"),
        (gives_nan, "wrong"),
    ],
)
def test_a_kernel_that_does_not_work_is_not_used(monkeypatch, make, problem):
    monkeypatch.setattr(row_kernel, "kernel_maker", lambda: make)
    rows, x = make_rows([5, 1, 5], 64), draw(2, 64, mx.float32)
    expected = row_kernel.gathered_into(x, rows)
    with pytest.warns(UserWarning, match=f"copied before each product: .*{problem}"):
        assert mx.array_equal(rows_into(x, rows), expected)
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        assert mx.array_equal(rows_into(x, rows), expected)


@pytest.mark.skipif(row_kernel.kernel_maker() is None, reason="no GPU")
@pytest.mark.parametrize("packing", [None, affine(4, 64), affine(8, 32)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_on_the_gpu(dtype, packing):
    """The kernel itself, not what takes its place where it does not work."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tokens in range(1, row_kernel.MOST_TOKENS + 1):
            for count in (3, 70, 1638):
                ids = some_ids(count, 3000)
                rows = make_rows(ids, 4096, dtype, packing, n=3000)
                assert_both_right(tokens, rows, dtype)
        if packing is None:
            assert_both_right(2, make_rows(some_ids(70), 1003, dtype), dtype)


# In an FFN


@pytest.mark.parametrize("T", [1, 3])
def test_a_neuron_layer_copies_no_rows(emulator, bench, T):
    chosen = np.arange(24)[None] % 8 == np.arange(T)[:, None]
    ffn = bench.ffn(22, lambda x: mx.array(chosen))
    x = bench.inputs(T)
    y = ffn(x)
    expected = bench.expected(x, chosen)
    bench.close()
    assert np.abs(np.array(y) - expected).max() < 1e-5 * np.abs(expected).max()
    into, out = emulator.calls[-2:]
    assert into["name"] == "flash_rows_into" and into["output_shapes"] == [
        (T, 3 * T + 1)
    ]
    # The weights are the slots, all of them, and not as many as were chosen (which are
    # rounded up to pairs here).
    assert into["shapes"][1] == out["shapes"][1] == (22, 16)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_projections_copy_no_rows(emulator, monkeypatch, bits):
    packing = affine(bits, 32)
    module = FFN(64, 96)
    nn.quantize(module, **packing)
    parts = {
        f"{name}.{key}": array
        for seed, name in enumerate(("fc1", "fc2"))
        for key, array in pack(draw(11, 64, mx.float32, seed), packing).items()
    }
    x, slots, neurons = draw(2, 64, mx.float32), mx.array([9, 2]), mx.array([7, 80])
    ffn = NeuronFFN(module)
    y = ffn.compute(x, parts, slots, neurons)
    into, out = emulator.calls[-2:]
    assert into["shapes"][1] == out["shapes"][1] == parts["fc1.weight"].shape
    monkeypatch.setattr(row_kernel, "kernel_maker", lambda: None)
    assert mx.allclose(y, ffn.compute(x, parts, slots, neurons), 1e-5, 1e-5)


# The emulator


def emulate(emulator, body, size):
    name = f"{emulator.dialect}_probe"
    kernel = emulator(
        name=name,
        input_names=["x"],
        output_names=["out"],
        header=row_kernel.HEADER.read_text(),
        source=row_kernel.CUDA_POSITION + body if "cuda" in name else body,
    )
    (out,) = kernel(
        inputs=[mx.arange(size, dtype=mx.float32)],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(64,)],
        output_dtypes=[mx.float32],
    )
    return out


SUM = "out[thread_position_in_grid.x] = mlx_flash::sum_of_lanes(value);"


def test_lanes_add_up_what_each_of_them_has(emulator):
    out = emulate(emulator, "float value = x[thread_position_in_grid.x];" + SUM, 64)
    assert out.tolist() == [31 * 16.0] * 32 + [31 * 16.0 + 32 * 32] * 32


def test_a_lane_that_leaves_the_others_waiting_is_noticed(emulator):
    leave = "float value = 1; if (thread_position_in_grid.x == 40) return;"
    with pytest.raises(AssertionError, match="lanes ended while others waited"):
        emulate(emulator, leave + SUM, 64)


def test_reading_beyond_the_end_is_noticed(emulator):
    if emulator.flags == gpu_emulator.FLAGS:
        pytest.skip("a compiler without sanitisers")
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        emulate(emulator, "float value = x[thread_position_in_grid.x];" + SUM, 63)
