"""`bench report`, `bench compare` and `tune`."""

import json

import pytest
from click.testing import CliRunner

from mlx_flash.bench import compare_reports, machine_report, tune
from mlx_flash.bench.machine_state import machine_state, parse_pmset, say_state
from mlx_flash.bench.report import Row
from mlx_flash.cli import main
from mlx_flash.errors import FlashError


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("CPU Power notify\n\tCPU_Speed_Limit \t= 73\n", "CPU speed limit 73 %"),
        ("Note: No thermal warning level has been recorded\n", "no warning"),
        ("Thermal warning level set to 2", "warning level 2"),
        ("", None),
    ],
)
def test_what_macos_says_of_its_temperature(text, found):
    assert parse_pmset(text) == found


def test_the_state_is_told_in_a_sentence():
    before = machine_state()
    after = before | {"power": "battery, 81 %", "thermal": None}
    after["swap_used_bytes"] += 5_000_000
    line = say_state(before, after)
    assert "power: battery, 81 %; thermal: not told by the system" in line
    assert "swap grew by 5 MB" in line


@pytest.mark.parametrize(
    ("seconds", "layers"), [(0.1, 48), (2.0, 12), (30.0, 1), (1000.0, 1)]
)
def test_models_are_as_large_as_time_allows(tmp_path, seconds, layers):
    (tmp_path / "w").write_bytes(b"x")
    choices = machine_report.EXPERT_LAYERS
    assert machine_report._affordable(choices, tmp_path, seconds, 30.0) == layers


def test_models_are_as_large_as_the_disk_allows(tmp_path, monkeypatch):
    (tmp_path / "w").write_bytes(bytes(1000))
    usage = type("Usage", (), {"free": 4 * 7000})
    monkeypatch.setattr(machine_report.shutil, "disk_usage", lambda path: usage)
    choices = machine_report.EXPERT_LAYERS
    assert machine_report._affordable(choices, tmp_path, 0.0, 30.0) == 6


def test_a_model_that_cannot_run_leaves_the_others(tmp_path, monkeypatch):
    """All of the command but the probe and the two large models."""

    def refuse(*_):
        raise FlashError("the disk is full")

    monkeypatch.setattr(machine_report, "probe", lambda *_: _profile())
    monkeypatch.setattr(machine_report, "_experts", refuse)
    monkeypatch.setattr(machine_report, "_opt", refuse)
    report = tmp_path / "report.json"
    done = CliRunner().invoke(
        main,
        ["bench", "report", "--folder", str(tmp_path), "--tokens", "4"]
        + ["--json", str(report)],
    )
    assert done.exit_code == 0, done.output
    found = json.loads(report.read_text())
    assert found["rows"][0]["tokens_per_s"] > 0
    assert [row.get("error") for row in found["rows"][1:]] == ["the disk is full"] * 2
    assert "swap_used_bytes" in found["state_after"]
    assert "demo model, 4 layers" in done.output


def _profile():
    from mlx_flash.profile import load_profile

    return load_profile("m1-max-paper")


def written(path, speed, device="a Mac", name="demo", benchmark="model"):
    rows = [{"name": name, "tokens_per_s": speed, "hit_rate": 0.5}]
    facts = {"benchmark": benchmark, "machine": {"device": device}, "rows": rows}
    path.write_text(json.dumps(facts))
    return path


def test_two_reports_side_by_side(tmp_path):
    a = written(tmp_path / "a.json", 10.0)
    b = written(tmp_path / "b.json", 25.0, device="another Mac")
    report = compare_reports.run(a, b)
    assert report.rows[0].more["ratio"] == 2.5
    assert "device: A a Mac; B another Mac" in report.notes


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{}]}', '{"rows": 3}'])
def test_what_is_no_report_is_refused(tmp_path, text):
    bad = tmp_path / "bad.json"
    bad.write_text(text)
    with pytest.raises(FlashError, match="bad.json is no report"):
        compare_reports.run(written(tmp_path / "a.json", 1.0), bad)


def test_reports_of_different_things_are_refused(tmp_path):
    a = written(tmp_path / "a.json", 1.0)
    with pytest.raises(FlashError, match="another benchmark"):
        compare_reports.run(a, written(tmp_path / "b.json", 1.0, benchmark="sweep"))
    with pytest.raises(FlashError, match="no row in common"):
        compare_reports.run(a, written(tmp_path / "b.json", 1.0, name="other"))


def row(memory, speed):
    return Row(str(memory), more={"budget_bytes": memory, "tokens_per_s": speed})


@pytest.mark.parametrize(
    ("speeds", "best"),
    [((10, 19, 20, 20), 2), ((20, 20, 20), 1), ((1, 2, 3), 3), ((5,), 1)],
)
def test_the_knee_is_the_least_memory_of_nearly_the_best_speed(speeds, best):
    rows = [row(i + 1, speed) for i, speed in enumerate(speeds)]
    assert tune.knee(rows).more["budget_bytes"] == best


def test_tune_of_the_demo_model(tmp_path):
    path = tmp_path / "tune.json"
    done = CliRunner().invoke(
        main,
        ["tune", "--tokens", "6", "--budgets", "3", "--repeats", "1"]
        + ["--json", str(path)],
    )
    assert done.exit_code == 0, done.output
    rows = json.loads(path.read_text())["rows"]
    budgets = [r["budget_bytes"] for r in rows]
    bytes_read = [r["bytes_per_token"] for r in rows]
    rates = [r["trace_hit_rate"] for r in rows]
    assert budgets == sorted(budgets) and len(set(budgets)) == 3
    assert bytes_read == sorted(bytes_read, reverse=True) and bytes_read[-1] == 0
    assert rates == sorted(rates) and rates[-1] == 1.0
    assert done.output.splitlines()[-1].startswith('mlx-flash generate "…" --memory ')
