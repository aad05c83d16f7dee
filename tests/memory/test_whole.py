"""Layers are held whole where a wait costs more than the hits that go with it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machine_profile import PROFILE

from mlx_flash.memory import whole
from mlx_flash.memory.divide import Curve
from mlx_flash.memory.whole import LOCALITY, Ask, Speeds, divide_by, hit_share, rewards

# A wait is worth 900 KB of flash, as on an M4.
SLOW_WAITS = Speeds(wait_s=3e-4, flash_bytes_per_s=3e9, memory_bytes_per_s=1e11)
NO_WAITS = replace(SLOW_WAITS, wait_s=0.0)
MB = 1 << 20
UNITS, CHOSEN = 64, 4


def divider(sizes, speeds=SLOW_WAITS):
    asks = [Ask(UNITS, size, CHOSEN) for size in sizes]
    return divide_by(asks, LOCALITY["expert"], rewards(asks, speeds))


def whole_ones(slots):
    return 0 if slots is None else sum(n == UNITS for n in slots)


def cost_bytes(slots, sizes, speeds=SLOW_WAITS):
    """What a token reads, and what flash would have read during its waits."""
    return sum(
        speeds.wait_s * speeds.flash_bytes_per_s
        + CHOSEN * size * (1 - hit_share(n / UNITS, LOCALITY["expert"]))
        for n, size in zip(slots, sizes, strict=True)
        if n < UNITS
    )


@given(
    st.lists(st.integers(MB // 4, 4 * MB), min_size=1, max_size=12),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_room_and_least_are_kept_and_more_room_makes_no_fewer_whole(sizes, a, b):
    divide, total = divider(sizes), UNITS * sum(sizes)
    least = [2] * len(sizes)
    found = []
    for share in sorted((a, b)):
        room = max(share * total, 2 * sum(sizes))
        slots = divide(sizes, room, least)
        if slots is not None:
            assert sum(n * s for n, s in zip(slots, sizes, strict=True)) <= room
            assert all(2 <= n <= UNITS for n in slots)
        found.append(whole_ones(slots))
    assert found[0] <= found[1]


@pytest.mark.parametrize("share", [x / 100 for x in range(5, 100)])
def test_whole_layers_never_cost_more_than_equal_shares(share):
    """But for what is left over of a layer, which saves only hits."""
    sizes = [2 * MB] * 24
    slots = divider(sizes)(sizes, share * UNITS * sum(sizes), [1] * 24)
    equal = cost_bytes([int(share * UNITS)] * 24, sizes)
    if slots is None:
        assert share < 0.8
    else:
        assert cost_bytes(slots, sizes) < equal


def test_near_full_residency_most_layers_are_whole_and_far_from_it_none():
    sizes = [2 * MB] * 48
    divide, total = divider(sizes), UNITS * sum(sizes)
    least = [1] * 48
    assert divide(sizes, 0.5 * total, least) is None
    assert whole_ones(divide(sizes, 0.90 * total, least)) > 24
    assert whole_ones(divide(sizes, 0.98 * total, least)) > 40


def test_where_waits_cost_nothing_slots_are_shared_equally():
    sizes = [MB] * 8
    assert divider(sizes, NO_WAITS) is None


def test_all_units_in_order_are_never_waited_for():
    asks = [Ask(UNITS, MB, None)] * 4
    assert rewards(asks, SLOW_WAITS) == [0.0] * 4
    assert divide_by(asks, LOCALITY["block"], [0.0] * 4) is None


def test_a_layer_of_neurons_held_whole_multiplies_all_of_them():
    """9/10 of 100 MB at 100 GB/s take longer than the wait; of 10 MB they do not."""
    for layer_bytes, pays in ((100e6, False), (10e6, True)):
        asks = [Ask(1000, int(layer_bytes) // 1000, 100.0)]
        (reward,) = rewards(asks, SLOW_WAITS, multiplies_all=True)
        assert (reward > 0) == pays
        (expert,) = rewards(asks, SLOW_WAITS)
        assert expert == pytest.approx(9e5) and reward < expert


def test_a_curve_whose_end_saves_a_wait_has_a_last_straight_piece():
    curve = Curve((0, 2, 4), (0.0, 8.0, 10.0))
    assert curve.rewarded(6.0) == Curve((0, 2, 4), (0.0, 8.0, 16.0))


# The figures of a machine


def test_the_speeds_are_those_of_the_profile():
    measured = replace(PROFILE, wait_s=1e-4)
    assert whole.machine_speeds(65536, measured) == Speeds(1e-4, 16e8, 1e11)


def test_without_a_profile_only_apple_silicon_waits(monkeypatch):
    assert whole.machine_speeds(65536, None).wait_s == 0
    monkeypatch.setattr(whole, "on_metal", lambda: True)
    assert whole.machine_speeds(65536, None) == whole.APPLE
    assert 2e-4 <= whole.APPLE.wait_s <= 4e-4
