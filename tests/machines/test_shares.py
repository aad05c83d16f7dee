"""Units belong to one rank each, in the shares that were agreed on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.errors import FlashError
from mlx_flash.machines.division import Facts, agree, held_by_all
from mlx_flash.machines.paths import on_rank, portable
from mlx_flash.machines.shares import fair_shares, owned, parse_shares
from mlx_flash.storage.manifest import StoredShare

SHARES = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@given(st.integers(1, 3000), st.sampled_from((512, 2048, 300_000, 2_000_000)), SHARES)
def test_every_unit_has_one_owner(units, unit_bytes, shares):
    parts = [owned(units, unit_bytes, shares, r) for r in range(len(shares))]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(units))


@given(st.integers(64, 3000), SHARES)
def test_owners_have_their_shares(units, shares):
    for rank, share in enumerate(shares):
        mine = len(owned(units, 1 << 20, shares, rank))
        assert abs(mine - units * share / sum(shares)) <= len(shares)


def test_hot_units_that_lie_together_are_spread():
    # 2,048 neurons of 2 KiB: the first eighth is asked for most.
    hot = [(owned(2048, 2048, (1, 1), rank) < 256).sum() for rank in (0, 1)]
    assert hot == [128, 128]


def test_shares_are_read_as_they_are_said():
    assert parse_shares("2:1:1", 3) == (2, 1, 1)
    for text in ("", "1:", "a:b", "0:1", "-1:2", "1.5:1"):
        with pytest.raises(FlashError, match="are no shares"):
            parse_shares(text, 2)
    with pytest.raises(FlashError, match="2 shares for 3 ranks"):
        parse_shares("1:1", 3)


def test_ranks_take_equally_long_to_read_what_they_lack():
    # 100 bytes on flash, 30 and 10 held: 60 missing, read at 2 and 1 a second.
    assert fair_shares([30, 10], [2.0, 1.0], 100) == (700, 300)
    assert fair_shares([10, 10], [1.0, 1.0], 100) == (500, 500)
    # All is held: as memory is, whatever the disks are.
    assert fair_shares([90, 30], [1.0, 9.0], 100) == (750, 250)


def facts(**changes):
    values = {
        "version": "1",
        "model": "abc",
        "unit": "expert",
        "share": None,
        "memory_bytes": 100,
        "on_flash_bytes": 400,
        "disk_rate": 0.0,
        "layer_s": 1e-3,
    }
    return Facts(**values | changes)


NAMES = "Rank 0 (a)", "Rank 1 (b)"


def test_ranks_agree_by_memory_where_no_disk_was_measured():
    two = [facts(memory_bytes=300), facts(memory_bytes=100, disk_rate=5.0)]
    assert agree(two, NAMES, None) == (750, 250)
    assert agree(two, NAMES, "3:2") == (3, 2)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"version": "2"}, r"Rank 0 \(a\) has mlx-flash 1, Rank 1 \(b\) has 2"),
        ({"model": "xyz"}, r"Rank 1 \(b\) has another model than Rank 0 \(a\)"),
        ({"unit": "block"}, "another model"),
        ({"adapter": "123"}, "another adapter"),
    ],
)
def test_ranks_that_differ_are_refused(other, said):
    with pytest.raises(FlashError, match=said):
        agree([facts(), facts(**other)], NAMES, None)


def test_facts_survive_the_way():
    stored = StoredShare((2, 1), 1, (16, 16), "abc")
    for given_facts in (facts(), facts(share=stored)):
        assert Facts.from_json(given_facts.to_json()) == given_facts


def test_layers_that_all_can_hold_are_not_divided():
    # 400 bytes in 4 layers, two equal ranks: 200 each, and 50 more for each layer.
    rich = facts(memory_bytes=320)
    assert held_by_all([rich, rich], (1, 1), 4, sum_s=1.0) == 2
    assert held_by_all([rich, facts(memory_bytes=260)], (1, 1), 4, sum_s=1.0) == 1
    assert held_by_all([rich, facts(memory_bytes=100)], (1, 1), 4, sum_s=1.0) == 0
    assert held_by_all([facts(memory_bytes=9000)] * 2, (1, 1), 4, sum_s=1.0) == 4
    # Half a layer takes 0.5 ms: a sum that takes less is better.
    assert held_by_all([rich, rich], (1, 1), 4, sum_s=0.4e-3) == 0


def test_models_lie_under_the_same_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "one"))
    told = portable(tmp_path / "one" / "models" / "part-1-of-3")
    monkeypatch.setenv("HOME", str(tmp_path / "two"))
    assert on_rank(told, 2, 3) == tmp_path / "two" / "models" / "part-3-of-3"
    assert on_rank("mlx-community/Qwen3-30B-A3B-4bit", 1, 2) == (
        "mlx-community/Qwen3-30B-A3B-4bit"
    )
