"""The families that were compared, and how one is compared."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_flash.bench.families import check, table
from mlx_flash.bench.families.check import Verdict
from mlx_flash.cli import main
from mlx_flash.layers import block

ROOT = Path(__file__).parents[2]


def test_the_families_that_were_compared():
    """What `mlx-flash bench families --write` wrote; they are not run here."""
    page = (ROOT / "docs" / "families.md").read_text()
    rows = re.findall(r"^\| (.+) \| (\w+) \| (\d+) of (\d+) \| (.+) \|$", page, re.M)
    units = [unit for _, unit, *_ in rows]
    assert len({name for name, *_ in rows}) >= 25 and units.count("expert") >= 20
    assert {"neuron", "block"} < set(units)
    for name, unit, some, every, difference in rows:
        assert some == every, name
        assert float(difference) <= (0 if unit == "expert" else 1e-4), name
    assert "DIFFERS" not in page and "FAILED" not in page


def test_the_page_is_what_would_be_written():
    page = (ROOT / "docs" / "families.md").read_text()
    rows = re.findall(r"^\| (.+) \| (\w+) \| (\d+ of \d+) \| (.+) \|$", page, re.M)
    verdicts = [Verdict(n, v, u, layers, difference=0.0) for n, u, layers, v in rows]
    made = table.page(verdicts)
    assert made.splitlines()[2:4] == page.splitlines()[2:4]
    lines = made.splitlines()
    assert set(lines[lines.index(table.HEAD[0]) : -2]) <= set(page.splitlines())


@pytest.fixture
def blocks(monkeypatch):
    """`check` sets the size of blocks in its process, which here is ours."""
    monkeypatch.setattr(block, "BLOCK_BYTES", block.BLOCK_BYTES)


@pytest.mark.parametrize(
    "family, unit, places",
    [("olmoe", "expert", "in place, converted"), ("qwen2", "block", "converted")],
)
def test_a_family_is_the_same_from_flash(blocks, tmp_path, family, unit, places):
    found = check.check(family, None, tmp_path, None)
    assert (found.unit, found.layers, found.places) == (unit, "2 of 2", places)
    assert found.tables == 1
    assert "DIFFERS" not in found.verdict


def test_dense_ffns_beside_experts(blocks, tmp_path):
    found = check.check("deepseek_v2", None, tmp_path, None, blocks=True)
    assert (found.unit, found.places) == ("expert", "converted")
    assert 0 < found.difference < 1e-4 and "DIFFERS" not in found.verdict


def test_wrong_logits_are_seen(blocks, tmp_path, monkeypatch):
    run = check.run
    monkeypatch.setattr(
        check,
        "run",
        lambda model, n: [x + hasattr(model, "flash") for x in run(model, n)],
    )
    found = check.check("qwen2", None, tmp_path, None)
    assert found.verdict.endswith("DIFFERS")


def test_a_family_that_crashes_keeps_its_line(monkeypatch):
    monkeypatch.setattr(table, "LIMIT_S", 0.01)
    (found,) = table.check_all({"olmoe": None})
    assert found.verdict.startswith("FAILED: crashed")
    assert table.summarise([found])["failed"] == ["olmoe"]


def test_the_command_names_families_and_keeps_the_page_whole(tmp_path):
    runner = CliRunner()
    wrong = runner.invoke(main, ["bench", "families", "--family", "parrots"])
    assert wrong.exit_code == 2 and "olmoe" in wrong.stderr
    args = ["bench", "families", "--family", "olmoe", "--write", str(tmp_path / "f.md")]
    assert runner.invoke(main, args).exit_code == 2
    assert not list(tmp_path.iterdir())
