"""Dense FFNs beside experts come from flash as blocks, and give the same logits."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model as mlx_load_model
from stock_checkpoints import LLAMA, QWEN3, stream, write_checkpoint

import mlx_flash
from mlx_flash import sizing
from mlx_flash.bench.families import check
from mlx_flash.bench.families.configs import make_config
from mlx_flash.converters.split import split
from mlx_flash.errors import FlashError, NotEnoughMemory
from mlx_flash.layers import block, lookup
from mlx_flash.layers.block import BlockFFN
from mlx_flash.layers.lookup import Lookup
from mlx_flash.planning.info import look_at
from mlx_flash.planning.plan import make_plan
from mlx_flash.planning.text import plan_text

CONTEXT = 512
# First layers that are dense, and shared experts beside the routed ones
DENSE = dict(first_k_dense_replace=1, n_shared_experts=2, num_hidden_layers=3)
MODELS = {
    name: make_config(name) | DENSE for name in ("deepseek_v2", "deepseek_v3")
} | {"qwen2_moe": make_config("qwen2_moe")}
V3 = MODELS["deepseek_v3"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(block, "BLOCK_BYTES", 2_000)


def convert(source, folder, **options):
    return mlx_flash.convert(source, folder, blocks=True, progress=False, **options)


def least_of(folder):
    with pytest.raises(NotEnoughMemory) as caught:
        mlx_flash.load_model(folder, 5000, context=CONTEXT)
    return caught.value.least_bytes


def assert_near(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert np.ptp(e) > 0
        assert np.abs(a - e).max() <= 1e-5 * np.abs(e).max()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits", [None, 4])
def test_models_from_the_least_memory_to_all(name, bits, tmp_path):
    source = check.write_checkpoint(tmp_path / "source", MODELS[name], bits)
    expected = check.run(mlx_load_model(source)[0], 70)
    folder = convert(source, tmp_path / "flash")
    least = least_of(folder)
    for memory in (least, int(1.2 * least), int(1.5 * least), "1GB"):
        with mlx_flash.load_model(folder, memory, context=CONTEXT) as (model, _):
            assert model.flash.beside
            assert all(isinstance(x, BlockFFN) for x in model.flash.beside)
            whole = [x.slots.holds_all for x in model.flash.beside]
            assert_near(check.run(model, 70), expected)
    assert all(whole)
    model = stream(folder, 2)  # and a slot for each dense FFN
    assert_near(check.run(model, 70), expected)
    assert not any(x.slots.holds_all for x in model.flash.beside)
    assert model.flash.stats.misses > model.flash.stats.hits
    model.flash.close()


def test_blocks_are_held_before_experts_and_cost_nothing_then(tmp_path):
    source = check.write_checkpoint(tmp_path / "source", V3, None)
    folder = convert(source, tmp_path / "flash")
    with mlx_flash.load_model(folder, "1GB", context=CONTEXT) as (model, _):
        most = model.flash.manifest.ffn_bytes
    for memory in range(least_of(folder), least_of(folder) + 2 * most, most // 8):
        with mlx_flash.load_model(folder, memory, context=CONTEXT) as (model, _):
            budget, manifest = model.flash.budget, model.flash.manifest
            pairs = zip(budget.beside_slots, manifest.blocks, strict=True)
            whole = [n == entry.units for n, entry in pairs]
            if budget.slots[0] > 1:
                assert all(whole)
            assert whole == sorted(whole, reverse=True)
            used = budget.resident_bytes + budget.beside_bytes + budget.slot_bytes
            used += budget.kv_bytes + budget.workspace_bytes
            assert used == budget.total_bytes


def test_the_least_memory_is_less_by_the_dense_ffns(tmp_path):
    config = V3 | dict(intermediate_size=4096, num_hidden_layers=4)
    config["first_k_dense_replace"] = 3
    source = check.write_checkpoint(tmp_path / "source", config, None)
    usual = mlx_flash.convert(source, tmp_path / "usual", progress=False)
    folder = convert(source, tmp_path / "flash")
    dense = 3 * 3 * 4096 * 64 * 4
    assert least_of(usual) - least_of(folder) > 0.8 * dense


def test_blocks_grow_and_shrink_with_the_budget(tmp_path):
    source = check.write_checkpoint(tmp_path / "source", V3, None)
    expected = check.run(mlx_load_model(source)[0], 70)
    folder = convert(source, tmp_path / "flash")
    little = int(1.3 * least_of(folder))
    with mlx_flash.load_model(folder, little, context=CONTEXT) as (model, _):
        for memory in (little, "1GB", little, "1GB"):
            model.flash.resize(memory)
            assert_near(check.run(model, 70), expected)


def test_with_rows_too(tmp_path, monkeypatch):
    monkeypatch.setattr(lookup, "LEAST_TABLE_BYTES", 1)
    source = check.write_checkpoint(tmp_path / "source", V3, None)
    expected = check.run(mlx_load_model(source)[0], 70)
    folder = convert(source, tmp_path / "flash")
    least = least_of(folder)
    with mlx_flash.load_model(folder, least, context=CONTEXT) as (model, _):
        kinds = [type(x) for x in model.flash.beside]
        assert kinds == [BlockFFN] * 3 + [Lookup]
        assert_near(check.run(model, 70), expected)
    assert abs(make_plan(folder, least, context=CONTEXT).least_bytes - least) <= 16_384


def test_guessing_ahead_passes_blocks_by(tmp_path):
    source = check.write_checkpoint(tmp_path / "source", V3, None)
    expected = check.run(mlx_load_model(source)[0], 70)
    model = stream(convert(source, tmp_path / "flash"), 3, look_ahead=True)
    assert_near(check.run(model, 70), expected)
    assert model.flash.stats.early > 0
    model.flash.close()


def test_figures_speak_of_blocks(tmp_path):
    source = check.write_checkpoint(tmp_path / "source", V3, None)
    folder = convert(source, tmp_path / "flash")
    manifest = json.loads((folder / "flash.json").read_text())
    assert (manifest["format_version"], manifest["unit"]) == (3, "expert")
    assert [entry["module"] for entry in manifest["blocks"]] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp.shared_experts",
        "model.layers.2.mlp.shared_experts",
    ]
    assert "3 FFNs" in look_at(folder).text()
    least = least_of(folder)
    plan = make_plan(folder, least, context=CONTEXT)
    assert "as blocks" in plan_text(plan)
    with mlx_flash.load_model(folder, least, context=CONTEXT) as (model, _):
        report = model.flash.report()
        assert (report.beside.blocks, report.layers_total) == (3, 2)
        assert any("as blocks" in line for line in report.beside.lines())


def test_the_same_command_goes_on_between_experts_and_blocks(tmp_path, monkeypatch):
    source = check.write_checkpoint(tmp_path / "source", V3, None)
    whole = convert(source, tmp_path / "whole")
    from mlx_flash.converters import conversion

    write, count = conversion._write_layer, []

    def stop(job, cutter, index):
        if index == 3 and not count:
            count.append(index)
            raise KeyboardInterrupt
        write(job, cutter, index)

    monkeypatch.setattr(conversion, "_write_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "flash")
    folder = convert(source, tmp_path / "flash")
    for file in whole.rglob("*.safetensors"):
        other = folder / file.relative_to(whole)
        assert other.read_bytes() == file.read_bytes()


def test_parts_have_all_blocks(tmp_path):
    source = check.write_checkpoint(tmp_path / "source", V3, None)
    folder = convert(source, tmp_path / "flash")
    first, _ = split(folder, 2, progress=False)
    alone = convert(source, tmp_path / "alone", share="1/2")
    for part in (first, alone):
        manifest = json.loads((part / "flash.json").read_text())
        assert len(manifest["blocks"]) == 3 and len(manifest["layers"]) == 2
    names = [sorted(x.name for x in p.rglob("*.safetensors")) for p in (first, alone)]
    assert names[0] == names[1]
    facts = [json.loads((p / "flash.json").read_text()) for p in (first, alone)]
    assert facts[0]["share"] == facts[1]["share"]


def test_who_has_too_little_memory_is_told_of_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(sizing, "WORTH_BLOCKS_BYTES", 1000)
    source = check.write_checkpoint(tmp_path / "source", V3, None)
    with pytest.raises(NotEnoughMemory, match="convert --blocks") as caught:
        mlx_flash.load_model(source, 5000, context=CONTEXT)
    mlx_flash.load_model(source, caught.value.least_bytes, context=CONTEXT)[
        0
    ].flash.close()
    folder = convert(source, tmp_path / "flash")
    with pytest.raises(NotEnoughMemory) as caught:
        mlx_flash.load_model(folder, 5000, context=CONTEXT)
    assert "--blocks" not in str(caught.value)


def test_what_is_no_dense_ffn_is_refused(tmp_path):
    source = check.write_checkpoint(tmp_path / "source", V3, None)
    folder = convert(source, tmp_path / "flash")
    file = folder / "flash.json"
    manifest = json.loads(file.read_text())
    manifest["blocks"][0]["module"] = "model.layers.0.self_attn"
    file.write_text(json.dumps(manifest))
    with pytest.raises(FlashError, match="blocks"):
        mlx_flash.load_model(folder, "1GB")


@pytest.mark.parametrize(
    "config, words", [(LLAMA, "mixtures of experts"), (QWEN3, "no dense FFN")]
)
def test_models_without_experts_or_without_dense_ffns(config, words, tmp_path):
    source = write_checkpoint(tmp_path / "source", config)
    with pytest.raises(FlashError, match=words):
        convert(source, tmp_path / "flash")
    assert not (tmp_path / "flash").exists()


def test_quantised_with_the_experts(tmp_path):
    source = check.write_checkpoint(tmp_path / "source", V3, None)
    folder = convert(source, tmp_path / "flash", bits=4, group_size=32)
    manifest = json.loads((folder / "flash.json").read_text())
    for entry in (*manifest["layers"], *manifest["blocks"]):
        assert {part["dtype"] for part in entry["parts"]} >= {"uint32"}
    with mlx_flash.load_model(folder, least_of(folder), context=CONTEXT) as (model, _):
        assert mx.isfinite(model(mx.array([[5, 6, 7]]))).all()
