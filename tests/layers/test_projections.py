"""FFNs of every kind computed from blocks of their neurons, beside the whole FFN."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_flash.layers.block import cut_blocks
from mlx_flash.layers.dense import dense_ffns, is_sum
from mlx_flash.layers.projections import projections
from mlx_flash.layers.slot_ffn import SlotFFN

D, N, BLOCKS = 64, 128, 4


class FFN(nn.Module):
    """Projections of these names and lengths, and what comes between them."""

    def __init__(self, ways: dict[str, int], out: str, act, bias=True):
        super().__init__()
        for name, rows in ways.items():
            self[name] = nn.Linear(D, rows, bias=bias)
        self[out] = nn.Linear(N, D, bias=bias)
        self.ways, self.out, self.act = list(ways), out, act

    def __call__(self, x):
        return self[self.out](self.act(*(self[name](x) for name in self.ways)))


def gated(gate, up):
    return nn.silu(gate) * up


def halves(y):
    return gated(*mx.split(y, 2, axis=-1))


def pairs(y):
    return gated(y[..., ::2], y[..., 1::2])


KINDS = {
    "gated": ({"gate_proj": N, "up_proj": N}, "down_proj", gated),
    "plain": ({"fc_in": N}, "fc_out", nn.gelu),
    "halves": ({"gate_up_proj": 2 * N}, "down_proj", halves),
    "halves, OpenELM": ({"proj_1": 2 * N}, "proj_2", halves),
    "pairs": ({"up_proj": 2 * N}, "down_proj", pairs),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", KINDS)
def test_blocks_add_up_to_the_whole(name, bits, bias):
    mx.random.seed(0)
    ffn = FFN(*KINDS[name], bias)
    if bits:
        nn.quantize(ffn, group_size=32, bits=bits)
    x = mx.random.normal((5, D))
    expected = ffn(x)
    parts = cut_blocks(ffn, BLOCKS)
    slots = SlotFFN(ffn, columns=True)

    def compute(order):
        """The blocks of each list together, as they lie in neighbouring slots."""
        total = 0
        for blocks in order:
            start = mx.array(blocks)[:, None] * (N // BLOCKS)
            neurons = (start + mx.arange(N // BLOCKS)).reshape(-1)
            total = total + slots.compute(x, parts, mx.array(blocks), neurons)
        return slots.finish([total])

    for order in ([[0], [1], [2], [3]], [[2, 0], [3, 1]], [[0, 1, 2, 3]]):
        assert mx.allclose(compute(order), expected, 1e-4, 1e-5), order
    whole = slots.finish([slots.compute(x, parts, slice(None))])
    assert mx.allclose(whole, expected, 1e-4, 1e-5)


@pytest.mark.parametrize(
    "ways, act",
    [
        ({"up_proj": N + 1}, lambda y: y[..., :N]),
        ({"gate_up_proj": N}, nn.silu),
        ({"gate_proj": 2 * N, "up_proj": 2 * N}, lambda g, y: pairs(g * y)),
    ],
)
def test_rows_that_belong_to_no_neuron(ways, act):
    assert projections(FFN(ways, "down_proj", act)) is None


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_a_sum_over_its_neurons(name):
    assert is_sum(FFN(*KINDS[name]))


@pytest.mark.parametrize(
    "ways, act",
    [
        ({"gate_up_proj": 2 * N}, pairs),  # another order than its name says
        ({"up_proj": 2 * N}, halves),
        ({"up_proj": N}, mx.softmax),
        ({"up_proj": N}, lambda y: nn.relu(y - y.mean(axis=-1, keepdims=True))),
    ],
)
def test_what_is_no_sum_over_its_neurons_stays_as_it_is(ways, act):
    model = nn.Sequential(FFN(ways, "down_proj", act))
    assert projections(model.layers[0]) and not dense_ffns(model)
