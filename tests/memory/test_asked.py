"""How often units were asked for, counted by the slots themselves."""

import mlx.core as mx
import numpy as np

from mlx_flash.memory.asked import Asked


def test_counts_what_each_step_asks_for():
    asked = Asked(4)
    asked.count(np.array([0, 2]))
    asked.count(np.array([2]))
    asked.count(np.array([], np.intp))
    assert asked.counts().tolist() == [1, 0, 2, 0]


def test_a_sweep_counts_for_all():
    asked = Asked(3)
    asked.count(np.arange(3))
    asked.count(np.array([1]))
    assert asked.counts().tolist() == [1, 2, 1]


def test_counts_are_a_copy():
    asked = Asked(2)
    asked.counts()[:] = 9
    assert asked.counts().tolist() == [0, 0]


def test_slots_count_what_a_layer_asks_for(bench):
    chosen = np.zeros((1, bench.UNITS), bool)
    chosen[0, [3, 5]] = True
    ffn = bench.ffn(4, lambda x: mx.array(chosen))
    mx.eval(ffn(bench.inputs(1)), ffn(bench.inputs(1)))
    expected = 2 * chosen[0]
    assert ffn.slots.asked.counts().tolist() == expected.tolist()
    bench.close()


def test_counts_outlive_a_resize(bench):
    chosen = np.zeros((1, bench.UNITS), bool)
    chosen[0, 7] = True
    ffn = bench.ffn(4, lambda x: mx.array(chosen))
    mx.eval(ffn(bench.inputs(1)))
    ffn.slots.resize(2, 10**6)
    mx.eval(ffn(bench.inputs(1)))
    assert ffn.slots.asked.counts().tolist() == (2 * chosen[0]).tolist()
    bench.close()
