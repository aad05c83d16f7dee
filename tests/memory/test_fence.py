"""What was computed from slots is there before they change, and soon let go of."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_flash.memory import fence as fence_module
from mlx_flash.memory.fence import Fence

MIB = 1 << 20


def test_one_result_is_kept_whatever_the_number_of_layers():
    fence = Fence()
    before = mx.get_active_memory()
    for layer in range(20):
        fence.hold(mx.zeros(MIB // 4) + layer)
    assert mx.get_active_memory() - before < 3 * MIB
    fence.settle()
    assert mx.get_active_memory() - before < MIB


@pytest.mark.parametrize("results", [None, [], 3])
def test_lists_and_nothing_can_be_held(results):
    fence = Fence()
    fence.hold([mx.ones(4) * 2] * results if results == 3 else results)
    fence.settle()


def test_the_one_before_is_waited_for_before_it_is_let_go_of(monkeypatch):
    """A KV cache may still hold what was made of it."""
    fence, waited = Fence(), []
    first, second = mx.ones(4) + 1, mx.ones(4) + 2
    fence.hold(first)
    monkeypatch.setattr(fence_module.mx, "eval", waited.append)
    fence.hold(second)
    assert [a is first for a in waited] == [True]
    fence.settle()
    assert waited[1] is second


def test_memory_may_change_once_it_settled():
    array, view = mx.zeros((1000,)), None
    mx.eval(array)
    view = np.asarray(array)
    fence = Fence()
    results = []
    for step in range(50):
        view[:] = step
        results.append(array * 1)
        fence.hold(results[-1])
        fence.settle()
    assert [r[0].item() for r in results] == list(range(50))


def test_what_cannot_be_computed_is_let_go_of(monkeypatch):
    fence = Fence()
    fence.hold(mx.ones(4))

    def refuse(_):
        raise RuntimeError("the GPU is gone")

    monkeypatch.setattr(fence_module.mx, "eval", refuse)
    with pytest.raises(RuntimeError, match="GPU"):
        fence.settle()
    monkeypatch.undo()
    fence.settle()
    fence.hold(mx.ones(4))
