"""Every benchmark runs on a small model and measures what its table says."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from machine_profile import PROFILE

from mlx_flash import DEMO_MODEL, FlashError, load
from mlx_flash.bench import (
    alone,
    dense_neurons,
    moe,
    opt,
    perplexity,
    plan_check,
    reader,
    turns,
)
from mlx_flash.bench import whole as whole_module
from mlx_flash.bench.report import Row, Sample
from mlx_flash.cli import main
from mlx_flash.cli.bench import BENCHMARKS
from mlx_flash.memory.stats import Stats
from mlx_flash.storage.manifest_reading import read_manifest
from mlx_flash.storage.safetensors import read_header

WORDS = "Once upon a time there was a little girl. She had a red ball. " * 60
SMALL_MOE = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "vocab_size": 128,
}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    return path


def run(*args, code=0):
    result = CliRunner().invoke(main, ["bench", *map(str, args)])
    assert result.exit_code == code, result.output
    return result.stdout


def rows_of(output: str) -> dict[str, list[str]]:
    lines = [
        line.strip("| ").split(" | ") for line in output.splitlines() if "|" in line
    ]
    return {name: cells for name, *cells in lines[2:]}


def test_every_benchmark_explains_itself():
    for name in BENCHMARKS:
        assert "Usage:" in run(name, "--help")


def test_listing_the_benchmarks_does_not_load_mlx():
    """In a process of its own: here the tests have loaded it."""
    script = (
        "import sys, mlx_flash.cli\n"
        "try: mlx_flash.cli.main(['bench', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'mlx.core', 'numpy'} & set(sys.modules)), file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr == "[]\n"
    for name, line in BENCHMARKS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", result.stdout, re.M)


def test_a_benchmark_that_is_not_there_is_refused():
    run("parrots", code=2)


@pytest.mark.parametrize(
    "args",
    [
        ("table2", "--tokens", 0),
        ("table2", "--dtype", "int8"),
        ("reader", "--missing", 2),
        ("sweep", "--memory", "much"),
        ("perplexity", "no such file"),
        ("peers", "--only", "parrots"),
    ],
)
def test_wrong_values_are_refused(args):
    run(*args, code=2)


def test_a_plot_that_cannot_be_drawn_is_refused_before_measuring(tmp_path):
    folder = tmp_path / "model"
    args = "--shape", "2x64x512", "--folder", folder, "--plot", tmp_path / "a.txt"
    run("table2", *args, code=1)
    assert not folder.exists()


def test_paper_has_both_tables():
    output = run("paper")
    assert output.count("| 2 | OPT 6.7B") == 5
    assert output.count("| Falcon 7B |") == 3
    assert "986 / 986 (+0%)" in output


def test_waits_are_modelled_for_two_machines():
    output = run("waits")
    assert "Modelled, not measured" in output
    assert "| 64 / 96 / 32 | 25.6 / 38.4 / 12.8 | 17.6 / 26.4 / 8.8 |" in output
    assert "90% in memory, equal shares | 48 | 19.2 + " in output
    whole = output.split("95% in memory, whole layers | ")[1]
    assert int(whole.split(" /")[0]) < 16


def test_reader_rows_differ_in_reader_and_policy(tmp_path):
    report = tmp_path / "r.json"
    args = "--layers", 2, "--units", 512, "--dims", 1024, "--tokens", 8
    run("reader", *args, "--window", 4, "--fio-seconds", 0, "--json", report)
    found = json.loads(report.read_text())
    assert found["options"]["window"] == [4] and found["options"]["rounds"] == 4
    rows = found["rows"]
    names = [row["name"] for row in rows]
    assert names == ["LRU, C reader", "LRU, Python reader", "window 4, C reader"]
    one, other, window = rows
    assert one["missing_share"] == other["missing_share"] > 0
    assert one["bytes_per_token"] == other["bytes_per_token"]
    assert one["resident_share"] <= 0.245 >= window["resident_share"]


def test_fio_that_fails_says_so(tmp_path, monkeypatch):
    program = tmp_path / "fio"
    program.write_text("#!/bin/sh\necho no such engine >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(FlashError, match="fio failed: no such engine"):
        reader.fio([tmp_path / "x"], 4096, 1)


@pytest.mark.slow
def test_placements_read_the_same_neurons(text, tmp_path):
    report = tmp_path / "p.json"
    args = "--tokens", 32, "--place-tokens", 64, "--rounds", 2, "--json", report
    run("placement", text, *args)
    rows = {row["name"]: row for row in json.loads(report.read_text())["rows"]}
    assert len(rows) == 6
    for name in ("checkpoint", "co-activation"):
        none, page, four = (rows[f"{name}, {gap} KiB"] for gap in (0, 4, 16))
        assert none["hit_rate"] == page["hit_rate"] == four["hit_rate"]
        assert none["reads_per_token"] > page["reads_per_token"]
        assert page["reads_per_token"] > four["reads_per_token"]
        assert none["bytes_per_token"] < four["bytes_per_token"]


def test_predictors_are_compared_at_equal_recall(text, tmp_path):
    report = tmp_path / "f.json"
    args = "--fit-tokens", 384, "--tokens", 128, "--steps", 2, "--json", report
    assert "95% of them are found" in run("predictors", text, *args)
    rows = json.loads(report.read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "rank 128, 4 bits afterwards",
        "rank 128, 4 bits trained as such",
        "rank 128, 3 bits trained as such",
        "rank 192, 3 bits trained as such",
    ]
    for row in rows:
        assert row["ratio"] > 1 and 0.95 < row["mass"] < 1
        assert len(row["by_layer"].split(", ")) == 4
    memory = [row["memory_bytes"] for row in rows]
    assert memory[2] < memory[0] == memory[1] < memory[3]


def test_units_that_nothing_predicts_have_no_predictors(monkeypatch):
    blocks = dataclasses.replace(read_manifest(DEMO_MODEL), unit="block")
    monkeypatch.setattr(dense_neurons, "read_manifest", lambda folder: blocks)
    with pytest.raises(FlashError, match="has no neurons but blocks"):
        dense_neurons.load_dense(DEMO_MODEL)


def test_overlap_decodes_the_same_tokens_three_times(tmp_path):
    report = tmp_path / "o.json"
    args = "--model", DEMO_MODEL, "--tokens", 4, "--json", report
    run("overlap", *args)
    turn, overlap, ahead = json.loads(report.read_text())["rows"]
    # Sums of two waves are rounded otherwise, and a score near zero may change sides.
    assert turn["hit_rate"] == pytest.approx(overlap["hit_rate"], abs=0.01)
    assert turn["hit_rate"] > 0
    assert turn["early_precision"] is None and 0 < ahead["early_precision"] <= 1
    assert "faster" not in turn and re.match(r"\d", ahead["faster"])


def test_turns_leave_out_the_warm_up_and_split_the_time():
    times = turns.Turns({"a": lambda x, cache: x, "b": lambda x, cache: x}, 2)
    times.samples["a"] = [Sample(Stats(), s) for s in (2.0, 4.0, 6.0)]
    times.samples["b"] = [Sample(Stats(), s) for s in (1.0, 2.0, 3.0)]
    assert times.ratio("a", "b") == (2.0, 2.0, 2.0)
    assert times.median_ms("a") == 4000


def test_whole_compares_every_kind_of_unit(monkeypatch):
    small = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 4,
        "moe_intermediate_size": 64,
        "vocab_size": 128,
    }
    models = {k: v | small for k, v in whole_module.MODELS.items()}
    monkeypatch.setattr(whole_module, "MODELS", models)
    assert set(rows_of(run("whole", "--tokens", 12))) == {
        "neurons",
        "blocks",
        "experts",
    }


@pytest.fixture
def small_moe(monkeypatch):
    monkeypatch.setattr(moe, "CONFIG", moe.CONFIG | SMALL_MOE)


@pytest.mark.slow  # a quarter of a minute
def test_experts_in_place_and_converted_read_the_same(small_moe, tmp_path):
    report, folder = tmp_path / "m.json", tmp_path / "kept"
    args = "--layers", 2, "--memory", "90%", "--tokens", 3, "--prompt-tokens", 4
    output = run("moe", *args, "--convert", "--folder", folder, "--json", report)
    place, converted = json.loads(report.read_text())["rows"]
    assert place["hit_rate"] == converted["hit_rate"]
    assert place["growth_bytes"] >= 0
    assert "Converting took" in output
    assert read_manifest(folder / "moe-flash").unit == "expert"
    # A second run takes both folders as they are.
    assert "Converting took" not in run("moe", *args, "--convert", "--folder", folder)


@pytest.mark.slow  # a quarter of a minute
def test_experts_as_they_are_published_read_the_same(small_moe, tmp_path):
    report, folder = tmp_path / "m.json", tmp_path / "kept"
    args = "--layers", 2, "--memory", "90%", "--tokens", 3, "--prompt-tokens", 4
    run("moe", *args, "--published", "--folder", folder, "--json", report)
    published, stacked = json.loads(report.read_text())["rows"]
    assert (published["name"], stacked["name"]) == ("as published", "in place")
    assert published["hit_rate"] == stacked["hit_rate"]
    # An expert's tensors lie side by side there, in the order of their names.
    assert published["reads_per_token"] < stacked["reads_per_token"]
    names, _ = read_header(folder / "moe-published" / "model-0.safetensors")
    assert "model.layers.0.mlp.experts.15.gate_proj.weight" in names


class Once:
    """Counts how often a function is called."""

    def __init__(self, function):
        self.function = function
        self.calls = 0

    def __call__(self, *args, **options):
        self.calls += 1
        return self.function(*args, **options)


@pytest.mark.slow  # a quarter of a minute
def test_memory_judges_conversions_and_budgets(tmp_path, monkeypatch):
    report = tmp_path / "m.json"
    monkeypatch.setattr(alone, "convert", once := Once(alone.convert))
    args = "--dims", 64, "--ffn", 512, "--layers", 1, "--vocab", 256, "--rank", 0
    args += "--calibration-tokens", 256, "--tokens", 3, "--exact-tokens", 2
    args += "--long", 0, "--dtype", "float32", "--folder", tmp_path / "kept"
    run("memory", *args, "--memory", "least", "--json", report)
    converted, least, exact = json.loads(report.read_text())["rows"]
    assert converted["kept"] and converted["peak_bytes"] > 1e6
    assert least["mlx_kept"] and least["kept"]
    assert least["slot_share"] == least["slots"] / least["units"] < 1
    assert exact["tokens"] == 2 and exact["bytes_per_token"] > 0
    output = run("memory", *args, "--memory", "1KB")
    assert output.count("1KB, exact: ") == output.count("1KB, predictor: ") == 1
    assert "needs at least" in output
    assert once.calls == 1, "the folder was there"


def test_growth_beyond_the_overhead_is_not_kept():
    from mlx_flash.bench import memory

    facts = {"budget_bytes": 10, "growth_per_token": 2e4}
    for extra, kept in ((0, True), (1, False)):
        growth = 10 + memory.OVERHEAD_BYTES + extra
        row = memory.judge(Row("a", more=facts | {"growth_bytes": growth}))
        assert row.more["kept"] is kept
    assert row.more["flat"] is False


def test_slope_is_that_of_the_second_half():
    assert alone.slope([0] * 10) is None
    assert alone.slope([1000] * 8 + [3 * i for i in range(8)]) == pytest.approx(3)


@pytest.mark.slow
def test_perplexity_is_the_same_whatever_the_memory(text, tmp_path, monkeypatch):
    some = {name: perplexity.POLICIES[name] for name in ("window 1", "lrfu, all slots")}
    monkeypatch.setattr(perplexity, "POLICIES", some)
    report = tmp_path / "p.json"
    args = "--tokens", 128, "--decode-tokens", 128, "--json", report
    assert "Perplexity on 128 tokens" in run("perplexity", text, *args)
    half = json.loads(report.read_text())
    options = {"memory": "150%", "predictor": False, "context": perplexity.LENGTH}
    with load(DEMO_MODEL, **options) as (net, tokenizer):
        dense = perplexity.perplexity(net, perplexity.cut(tokenizer, text, 128))
    assert half["dense"] == pytest.approx(dense, rel=1e-3)  # float16 in another order
    assert abs(half["predicted"] / half["dense"] - 1) < 0.05
    rows = {row["name"]: row for row in half["rows"]}
    assert rows["window 1"]["hit_rate"] < rows["lrfu, all slots"]["hit_rate"]


def test_a_text_without_a_piece_is_refused(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time")
    with pytest.raises(FlashError, match="Give a longer text"):
        perplexity.run(short, DEMO_MODEL, "50%", 128, 128)


def test_plan_check_needs_a_profile(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_check, "load_profile", lambda: None)
    with pytest.raises(FlashError, match="mlx-flash probe"):
        plan_check.run(tmp_path)
    assert not list(tmp_path.iterdir())


def test_plan_check_takes_the_hit_rate_of_the_run(small_moe, tmp_path, monkeypatch):
    small = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 4096}
    small |= {"num_key_value_heads": 2, "head_dim": 32}
    llama = plan_check.LLAMA | small | {"num_hidden_layers": 2, "vocab_size": 128}
    shape = opt.Shape(2, 64, 4096, heads=2, vocab=96, dtype="float32")
    monkeypatch.setattr(plan_check, "load_profile", lambda: PROFILE)
    monkeypatch.setattr(plan_check, "LLAMA", llama)
    monkeypatch.setattr(plan_check, "OPT", shape)
    report = plan_check.run(tmp_path, memory=("80%", "1KB"), tokens=8, rounds=1)
    rows = {row.name: row for row in report.rows}
    for kind in ("neurons", "experts", "blocks"):
        row = rows[f"{kind}, 80%"]
        assert row.more["modelled_ms"] > 0 and row.total_ms
        assert row.more["off"] == pytest.approx(
            row.more["modelled_ms"] / row.total_ms - 1
        )
        assert "needs at least" in rows[f"{kind}, 1KB"].more["error"]


def test_rows_survive_json():
    row = Row("a", io_ms=1.0, std={"io_ms": 0.5}, more={"hit_rate": 0.25})
    assert Row.from_json(json.loads(json.dumps(row.to_json()))) == row


def test_nothing_is_left_beside_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("table2", "--shape", "2x64x512", "--vocab", 96, "--tokens", 2, "--rounds", 1)
    assert not list(Path().iterdir())


def test_prompts_are_read_once_and_within_the_budget(tmp_path):
    report = tmp_path / "p.json"
    ways = "--through", "stream_generate", "--through", "batch_generate"
    size = "--tokens", 300, "--layers", 8, "--width", 128
    run(
        "prompts",
        "--kind",
        "experts",
        "--kind",
        "blocks",
        *ways,
        *size,
        "--json",
        report,
    )
    rows = json.loads(report.read_text())["rows"]
    assert len(rows) == 4
    for row in rows:
        assert row["chunk_tokens"] >= 298, row["name"]
        assert 0 < row["times_missing"] <= 1.1, row["name"]
        assert row["peak_share"] <= row["held_share"] <= 1, row["name"]
