"""Slots go where they save most, and never beyond the room there is."""

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.memory.divide import Curve, divide


@st.composite
def curves(draw):
    """Concave curves, hits for every number of slots."""
    made = []
    for _ in range(draw(st.integers(1, 3))):
        gains = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
        hits = np.cumsum([0, *sorted(gains, reverse=True)])
        made.append(Curve(tuple(range(len(hits))), tuple(hits.tolist())))
    return made


@given(curves(), st.integers(0, 16))
def test_no_division_of_concave_curves_hits_more(layers, room):
    n = len(layers)
    slots = divide(layers, [1] * n, room, [0] * n)
    assert sum(slots) <= room
    best = max(
        sum(c.hits[k] for c, k in zip(layers, ks, strict=True))
        for ks in product(*(c.slots for c in layers))
        if sum(ks) <= room
    )
    assert sum(c.hits[k] for c, k in zip(layers, slots, strict=True)) == best


@given(curves(), st.integers(0, 60), st.data())
def test_room_least_and_most_are_kept(layers, room, data):
    sizes = [data.draw(st.integers(1, 5)) for _ in layers]
    least = [data.draw(st.integers(0, c.slots[-1])) for c in layers]
    slots = divide(layers, sizes, room, least)
    assert all(
        a <= n <= c.slots[-1] for a, n, c in zip(least, slots, layers, strict=True)
    )
    taken = sum(n * b for n, b in zip(slots, sizes, strict=True))
    assert taken <= max(room, sum(n * b for n, b in zip(least, sizes, strict=True)))


def test_a_cliff_is_worth_its_whole_height():
    """A loop over 8 units hits nothing with fewer slots, everything with 8."""
    curve = Curve((0, 4, 8, 16), (0.0, 0.0, 80.0, 80.0))
    assert curve.hull() == [(10.0, 0, 8), (0.0, 8, 16)]
