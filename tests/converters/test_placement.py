"""An order of neurons that puts what fires together side by side."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.converters.calibrate.placement import order_by_coactivation


def place(fired, **sizes):
    bits = np.packbits(fired, axis=1)
    return order_by_coactivation(bits, fired.shape[1], **sizes)


def reads(fired, order):
    """Reads of all tokens if neighbours in the order are read as one."""
    wanted = fired[:, order].astype(int)
    return int(wanted[:, 0].sum() + (np.diff(wanted, axis=1) == 1).sum())


@st.composite
def activity(draw):
    tokens, units = draw(st.integers(0, 12)), draw(st.integers(1, 20))
    row = st.lists(st.booleans(), min_size=units, max_size=units)
    rows = draw(st.lists(row, min_size=tokens, max_size=tokens))
    return np.array(rows, bool).reshape(tokens, units)


@given(activity(), st.integers(2, 5), st.integers(1, 5))
def test_every_neuron_has_one_place(fired, neurons, tokens):
    sizes = {"partners": neurons, "block_neurons": neurons, "block_tokens": tokens}
    order = place(fired, **sizes)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(fired.shape[1]))


@given(activity())
def test_blocks_do_not_matter(fired):
    blocked = place(fired, block_neurons=3, block_tokens=2)
    assert blocked.tolist() == place(fired).tolist()


def grouped(groups=16, size=8, tokens=600, seed=0):
    """Groups that fire as a whole, their members scattered over the layer."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(groups), size))
    return (rng.random((tokens, groups)) < 0.15)[:, group], group


def test_groups_come_together():
    fired, group = grouped()
    along = group[place(fired)]
    assert (np.diff(along) != 0).sum() == 15, "each group is one run"


def test_fewer_reads_of_tokens_not_seen():
    """Members fire nine times in ten when their group does: order from one half."""
    fired, _ = grouped(tokens=1200)
    fired &= np.random.default_rng(1).random(fired.shape) < 0.9
    order = place(fired[:600])
    assert reads(fired[600:], order) < 0.4 * reads(fired[600:], np.arange(128))


def test_the_heaviest_links_win():
    """0 and 3 fire together four times, 3 and 1 three times, 1 and 2 twice."""
    pairs = [(0, 3)] * 4 + [(1, 3)] * 3 + [(1, 2)] * 2 + [(0, 1)] * 2
    fired = np.zeros((len(pairs), 4), bool)
    for row, pair in zip(fired, pairs, strict=True):
        row[list(pair)] = True
    assert place(fired).tolist() in ([0, 3, 1, 2], [2, 1, 3, 0])


def test_more_rounds_when_partners_run_out():
    """With one partner kept each, two chains still meet in a later round."""
    fired, group = grouped()
    along = group[place(fired, partners=1)]
    assert (np.diff(along) != 0).sum() == 15


def test_what_never_fires_keeps_its_order():
    fired = np.zeros((5, 6), bool)
    fired[:, [1, 4]] = True
    assert place(fired).tolist() == [0, 1, 4, 2, 3, 5]


def test_bits_of_another_width_are_refused():
    with pytest.raises(ValueError, match="not those of 24 neurons"):
        order_by_coactivation(np.zeros((4, 2), np.uint8), 24)
