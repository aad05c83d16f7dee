"""`plan --machines`: what several machines share, by sums done by hand."""

import json
from dataclasses import replace

import pytest
import stock_checkpoints as stock
from click.testing import CliRunner
from machine_profile import PROFILE
from opt_checkpoints import make_checkpoint

from mlx_flash.assembly import assemble
from mlx_flash.cli import main
from mlx_flash.converters.convert import convert
from mlx_flash.errors import FlashError
from mlx_flash.load_options import LoadOptions
from mlx_flash.machines.division import cut
from mlx_flash.planning.outline import outline
from mlx_flash.planning.plan import plan_of
from mlx_flash.planning.several import (
    Several,
    parse_link,
    part_of,
    plan_several,
    sum_bytes,
    sum_s,
    together,
    whole_of,
)
from mlx_flash.profile import save_profile
from mlx_flash.sizing import budget_of, needs_of, policy_of

LLAMA = stock.LLAMA | {"intermediate_size": 192}
MOE = stock.QWEN3 | {"num_experts": 16}


@pytest.fixture(autouse=True)
def no_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("MLX_FLASH_PROFILE", raising=False)


@pytest.fixture
def experts(tmp_path):
    return stock.write_checkpoint(tmp_path / "experts", MOE)


@pytest.fixture
def blocks(tmp_path):
    return stock.write_checkpoint(tmp_path / "blocks", LLAMA)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2ms", 2e-3), ("0.3 ms", 3e-4), ("50us", 5e-5), (".1S", 0.1)],
)
def test_times_of_a_link(text, seconds):
    assert parse_link(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "2", "ms", "-1ms", "0ms", "1GB", "2 hours"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(FlashError, match=r"Try 0\.3ms"):
        parse_link(text)


def test_a_sum_in_a_ring_by_hand():
    # Four machines: 3 messages to add up, 3 to pass on, a quarter of the array each.
    assert sum_s(4, 1_000_000, 1e-3) == pytest.approx(6 * (1e-3 + 0.25e-3))
    assert sum_s(2, 0, 1e-3) == pytest.approx(2e-3)


def test_what_is_added_up(experts, blocks):
    width = MOE["hidden_size"]
    assert sum_bytes(outline(blocks)) == 4 * LLAMA["hidden_size"]
    assert sum_bytes(outline(experts)) == 4 * width * MOE["num_experts_per_tok"]


def test_two_machines_with_blocks_by_hand(blocks):
    one, two = plan_several(blocks, "70%", PROFILE, 2, link="2ms", context=16)
    whole = outline(blocks)
    parts = [part_of(whole, (1, 1), r) for r in (0, 1)]
    alone = [
        plan_of(part, blocks, one.memory_bytes, PROFILE, context=16) for part in parts
    ]
    # Each holds what its memory has room for, and reads the rest of its share.
    for part, plan in zip(parts, alone, strict=True):
        missing = (1 - plan.held_share) * part.manifest.ffn_bytes
        assert plan.bytes_per_token == pytest.approx((missing, missing))
    assert two.bytes_per_token[1] == max(plan.bytes_per_token[1] for plan in alone)
    assert two.bytes_per_token[1] < one.bytes_per_token[1] / 2
    assert one.held_share < two.held_share
    # 2 layers, a sum of 2 messages each, of half of 256 bytes; 3 more for the call.
    sum_ms = 2 * 2 * (2 + 1e3 * 128 / 1e9)
    assert two.sums_per_token == 2 and two.bytes_per_sum == 256
    assert two.sum_ms == pytest.approx(sum_ms) and two.call_ms == pytest.approx(6)
    slowest = max(plan.ms_per_token[1] for plan in alone)
    assert two.ms_per_token[1] == pytest.approx(slowest + sum_ms + 6)
    assert two.tokens_per_s[0] == pytest.approx(1e3 / two.ms_per_token[1])
    assert one.memory_bytes == two.memory_bytes  # a share of the whole model, on each


def test_a_sum_has_a_gpu_wait(blocks):
    waiting = replace(PROFILE, wait_s=1e-3)
    sums = [
        plan_several(blocks, "70%", profile, 2, context=16)[1].sum_ms
        for profile in (PROFILE, waiting)
    ]
    assert sums[1] - sums[0] == pytest.approx(2)  # in each of 2 layers


def test_a_machine_has_its_share_of_a_tokens_experts(experts):
    """Hits of half of what is asked for: half of half of 2 experts is read."""
    one, two = plan_several(experts, "40%", PROFILE, 2, context=16, hit_rate=0.5)
    assert two.bytes_per_token[0] == pytest.approx(one.bytes_per_token[0] / 2, rel=0.1)
    _, uneven = plan_several(
        experts, "40%", PROFILE, 2, "3:1", context=16, hit_rate=0.5
    )
    assert uneven.shares == (3, 1)
    assert uneven.bytes_per_token[0] == pytest.approx(
        0.75 * one.bytes_per_token[0], rel=0.1
    )


def test_where_all_experts_are_held_others_are_multiplied_in_place_of_absent(experts):
    """A machine with all its experts in memory multiplies as many as one with all."""
    found = outline(experts)
    whole = plan_of(found, experts, "300%", PROFILE, context=16, hit_rate=1.0)
    part = part_of(found, (1, 1), 0)
    half = plan_of(part, experts, "300%", PROFILE, context=16, hit_rate=1.0)
    assert half.held_share == whole.held_share == 1
    assert half.ms_of_slowest["compute"] == pytest.approx(
        whole.ms_of_slowest["compute"]
    )


@pytest.mark.parametrize("kind", ["experts", "blocks", "neurons"])
def test_a_part_is_planned_as_it_is_loaded(kind, tmp_path):
    if kind == "experts":
        folder = stock.write_checkpoint(tmp_path / "model", MOE)
    elif kind == "blocks":
        source = stock.write_checkpoint(tmp_path / "model", LLAMA)
        folder = convert(source, tmp_path / "flash", progress=False)
    else:
        source = make_checkpoint(tmp_path / "model")
        folder = convert(source, tmp_path / "flash", rank=0, progress=False)
    options = LoadOptions(context=16)
    parts = cut(assemble(folder, True), (2, 1), 1, lambda y: y)
    planned = part_of(whole_of(outline(folder)), (2, 1), 1)
    memory = int(1.02 * plan_of(planned, folder, "1GB", context=16).least_bytes)
    footprint, divide = needs_of(parts, policy_of(options, parts.kind), options)
    budget = budget_of(memory, None, footprint, folder, divide, None)
    plan = plan_of(planned, folder, memory, context=16)
    assert 0 < plan.held_share <= 1
    assert plan.slot_bytes == budget.slot_bytes
    held = zip(budget.slots, parts.manifest.layers, strict=True)
    nbytes = sum(n * layer.unit_bytes for n, layer in held)
    assert plan.held_share == pytest.approx(nbytes / parts.manifest.ffn_bytes)


def test_too_few_units_for_so_many_machines(experts):
    with pytest.raises(FlashError, match=r"has 16 experts, too few .* fewer machines"):
        plan_several(experts, "1GB", None, 2, "1000:1", context=16)


def test_the_slowest_machine_counts(blocks):
    found = outline(blocks)
    plans = [plan_of(found, blocks, "1GB", PROFILE, context=16)] * 2
    slow = replace(plans[0], ms_per_token=(7.0, 9.0))
    both = together(found, [plans[0], slow], (1, 1), 1e-3, PROFILE)
    assert both.ms_per_token[1] == pytest.approx(9 + both.sum_ms + both.call_ms)


def run(*args, code=0):
    result = CliRunner().invoke(main, ["plan", *map(str, args)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_shows_one_machine_beside_several(blocks, tmp_path):
    save_profile(PROFILE, tmp_path / "profile.json")
    words = (
        blocks,
        "--context",
        16,
        "--memory",
        "70%",
        "--profile",
        tmp_path / "profile.json",
    )
    text = run(*words, "--machines", 3, "--link", "2ms", "--shares", "2:1:1")
    assert "3 machines like this one, shares 2:1:1" in text
    assert "modelled, nothing of it was measured" in text
    for line in ("in memory", "MB read by each", "ms in sums", "tokens/s"):
        assert f"\n{line}" in text
    assert "a message takes 2 ms" in text
    facts = json.loads(run(*words, "--machines", 2, "--json"))
    assert facts["several"].keys() == Several.__dataclass_fields__.keys()
    assert facts["several"]["link_s"] == pytest.approx(0.3e-3)
    assert facts["tokens_per_s"][0] > 0


def test_without_a_profile_there_are_no_times(blocks):
    text = run(blocks, "--context", 16, "--memory", "70%", "--machines", 2)
    assert "MB read by each" in text and "\ntokens/s" not in text


@pytest.mark.parametrize("words", [("--link", "2ms"), ("--shares", "2:1")])
def test_links_and_shares_are_those_of_several(words, blocks):
    assert "go with --machines" in run(blocks, *words, code=2)


def test_shares_must_be_as_many(blocks):
    text = run(blocks, "--machines", 3, "--shares", "2:1", code=1)
    assert "Give one for each" in text
