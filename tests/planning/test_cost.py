"""The cost model against the paper's tables, and against sums done by hand."""

import dataclasses
import math

import pytest
from machine_profile import PROFILE, point

from mlx_flash.bench.paper import TABLE_2, TABLE_3, model_row
from mlx_flash.planning.cost import (
    FlashLayer,
    Matrices,
    Work,
    load_s,
    prompt_cost,
    token_cost,
)

FLAT = dataclasses.replace(PROFILE, flash=(point(4096, 1, 1e9), point(1 << 23, 1, 1e9)))
NO_BOOKS = dataclasses.replace(FLAT, cache_layer_s=0.0, cache_slot_s=0.0)


def layer(**changes):
    """A thousand neurons of 16 KiB, a tenth selected, of which half is there."""
    fields = dict(
        weights=Matrices("gathered", "float32", 0, 1000 * 16384, 1000 * 4096),
        units=1000,
        unit_bytes=16384,
        slots=250,
        pieces=1,
        selected=100.0,
        hit_rate=0.5,
        computed=100.0,
    )
    return FlashLayer(**fields | changes)


def work(*layers, resident=(), **changes):
    return Work(tuple(resident), layers, **{"steps": 0} | changes)


@pytest.mark.parametrize("row", TABLE_2, ids=lambda row: row.method)
def test_table_2_io_within_15_percent(row):
    io_ms = 1e3 * model_row(row).io_s
    assert abs(io_ms / row.io_ms - 1) < 0.15, f"{io_ms:.0f} ms, paper {row.io_ms}"


@pytest.mark.parametrize("row", TABLE_3, ids=lambda r: f"{r.model.name} {r.method}")
def test_table_3_io_within_15_percent(row):
    assert abs(1e3 * model_row(row).io_s / row.io_ms - 1) < 0.15


def test_bytes_of_the_paper():
    """Table 2's column "flash to DRAM", GB per token."""
    expected = [13.4, 6.7, 0.9, 0.2, 0.2]
    found = [round(model_row(row).bytes_read / 1e9, 1) for row in TABLE_2]
    assert [abs(a - b) <= 0.101 for a, b in zip(found, expected, strict=True)] == [
        True
    ] * 5


def test_a_token_by_hand():
    cost = token_cost(NO_BOOKS, work(layer(merged=False)))
    assert cost.reads == 50
    assert math.isclose(cost.bytes_read, 50 * 16384)
    # All at 1 GB/s, and half the latency of a full queue of 32
    assert math.isclose(cost.io_s, (50 + 16) * 16384 / 1e9)
    assert math.isclose(cost.compute_s, 100 * 16384 / 1e10)
    assert cost.cache_s == 0


def test_merging_saves_reads_and_no_bytes():
    cost = token_cost(NO_BOOKS, work(layer()))
    assert cost.reads == 50 * 0.95  # 5 % of the units are missing
    assert math.isclose(cost.bytes_read, 50 * 16384)


def test_units_shorter_than_a_page_cost_pages():
    one = token_cost(NO_BOOKS, work(layer(unit_bytes=1024, selected=2.0)))
    assert math.isclose(one.bytes_read, 4096, rel_tol=0.01)
    between = token_cost(NO_BOOKS, work(layer(unit_bytes=1000, selected=2.0)))
    assert 4096 < between.bytes_read < 2 * 4096  # which may lie on two pages
    every = token_cost(NO_BOOKS, work(layer(unit_bytes=1024, selected=2000.0)))
    assert math.isclose(every.bytes_read, 1000 * 1024)


def test_units_that_begin_anywhere_cost_a_page_more():
    aligned = token_cost(NO_BOOKS, work(layer()))
    odd = token_cost(NO_BOOKS, work(layer(unit_bytes=16385)))
    assert math.isclose(odd.bytes_read, 50 * 16385 + odd.reads * 4096)
    assert odd.reads == aligned.reads
    parts = layer(pieces=2, in_place=True, merged=False)
    cost = token_cost(NO_BOOKS, work(parts))
    assert math.isclose(cost.reads, 2 * 50)
    assert math.isclose(cost.bytes_read, 2 * 50 * (8192 + 4096))


def test_books_are_kept_for_every_layer_that_has_less_than_all():
    cost = token_cost(FLAT, work(layer(), layer(hit_rate=1.0), layer(slots=1000)))
    assert math.isclose(cost.cache_s, 2 * (1e-5 + 250 * 1e-8))


def test_waits_and_launches_are_counted_in_layers_whose_units_are_chosen():
    slow = dataclasses.replace(NO_BOOKS, wait_s=4e-4, launch_s=1e-6)
    chosen, plain = layer(waits=1, launches=6), layer()
    more, less = (token_cost(slow, work(x, x)) for x in (chosen, plain))
    assert (more.waits, less.waits) == (2, 0)
    assert more.wait_s == 2 * 4e-4 and less.wait_s == 0
    assert math.isclose(more.compute_s, less.compute_s + 2 * 6e-6)
    assert math.isclose(more.total_s, less.total_s + 2 * 4e-4 + 2 * 6e-6)
    prompt = prompt_cost(slow, work(chosen, plain), tokens=64, chunk=32)
    assert prompt.waits == 2 and prompt.wait_s == 2 * 4e-4


def test_the_paper_waits_on_metal_alone():
    """One wait a layer is 13 ms: far from the 335 ms that its compute is off."""
    found = {(r.method, r.dtype): model_row(r).wait_s for r in TABLE_3[:4]}
    assert found["+ bundles", "float16"] == pytest.approx(32 * 4e-4)
    assert [s for s in found.values() if s] == [found["+ bundles", "float16"]]


def test_a_layer_held_whole_reads_nothing():
    cost = token_cost(FLAT, work(layer(slots=1000, computed=1000.0)))
    assert (cost.io_s, cost.reads, cost.bytes_read) == (0, 0, 0)
    assert math.isclose(cost.compute_s, 1000 * 16384 / 1e10)


def test_resident_weights_layers_and_caches_are_compute():
    outer = Matrices("matmul", "float32", 4, 4e9, 8e9)
    cost = token_cost(FLAT, work(resident=[outer], steps=10, kv_bytes=1e9))
    assert math.isclose(cost.compute_s, 4e9 / 2e10 + 10 * 1e-4 + 1e9 / 1e11)
    assert math.isclose(cost.tokens_per_s, 1 / cost.total_s)


def test_blocks_are_read_in_order():
    swept = layer(random=False, selected=1000.0, hit_rate=0.25)
    cost = token_cost(NO_BOOKS, work(swept))
    assert math.isclose(cost.bytes_read, 750 * 16384)
    assert math.isclose(cost.io_s, 750 * 16384 / 3.2e9)


@pytest.mark.parametrize("hit_rate", [0.99, 0.999, 1.0])
def test_rare_misses_wait_for_a_whole_read(hit_rate):
    """Time goes with the misses, also where most tokens have none."""
    rare = layer(unit_bytes=1 << 20, selected=1.0, hit_rate=hit_rate)
    cost = token_cost(NO_BOOKS, work(rare))
    mean_bytes = (1 - hit_rate) * (1 << 20)
    assert mean_bytes / 1e9 <= cost.io_s <= 1.6 * mean_bytes / 1e9


def test_a_better_hit_rate_never_costs_more():
    costs = [token_cost(FLAT, work(layer(hit_rate=h / 10))) for h in range(11)]
    totals = [cost.total_s for cost in costs]
    assert totals == sorted(totals, reverse=True)


def test_a_prompt_sweeps_what_memory_does_not_hold():
    cost = prompt_cost(NO_BOOKS, work(layer()), tokens=64, chunk=32)
    assert math.isclose(cost.bytes_read, 2 * 750 * 16384)
    assert math.isclose(cost.io_s, 2 * 750 * 16384 / 3.2e9)
    arithmetic = 2 * 64 * 1000 * 4096 / 1e12
    by_bytes = 2 * 1000 * 16384 / 5e10
    assert math.isclose(cost.compute_s, max(arithmetic, by_bytes))


def test_a_prompt_reads_the_experts_that_its_tokens_choose():
    weights = Matrices("experts", "float32", 0, 8 << 20, 2 << 20)
    moe = layer(weights=weights, units=8, unit_bytes=1 << 20, slots=2, selected=1.0)
    one = prompt_cost(NO_BOOKS, work(moe), 1, 512)
    many = prompt_cost(NO_BOOKS, work(moe), 512, 512)
    assert math.isclose(one.bytes_read, 0.75 * (1 << 20))
    assert math.isclose(many.bytes_read, 6 * (1 << 20), rel_tol=1e-3)


def test_loading_reads_in_order():
    assert load_s(FLAT, work(load_bytes=6.4e9)) == 2.0


@pytest.mark.parametrize(
    "random, hit_rate, hidden_share", [(True, 0.5, 0.5), (True, 0.0, 0), (False, 0, 1)]
)
def test_what_is_there_is_multiplied_beside_the_reading(random, hit_rate, hidden_share):
    """At most as long as that multiplying takes, and never more than all of it."""
    weights = Matrices("matmul", "float32", 0, 1e9, 2.5e8)
    layer = FlashLayer(weights, 100, 1e7, 20, 1, 100, hit_rate, 100, random)
    plain = token_cost(PROFILE, Work((), (layer,), 0))
    beside = token_cost(
        PROFILE, Work((), (dataclasses.replace(layer, overlap=True),), 0)
    )
    hidden = plain.io_s - beside.io_s
    assert hidden == pytest.approx(min(plain.io_s, hidden_share * plain.compute_s))
    assert beside.compute_s == plain.compute_s and beside.reads == plain.reads
