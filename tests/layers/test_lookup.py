"""Rows of embeddings from flash are those that mlx-lm finds with all in memory."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import save_tokenizer
from mlx_lm.utils import load_model as mlx_load_model
from stock_checkpoints import (
    LLAMA,
    LONGCAT,
    QWEN3,
    assert_same,
    make_weights,
    run,
    write_checkpoint,
)

import mlx_flash
from mlx_flash.bench.families import check
from mlx_flash.bench.families.configs import make_config
from mlx_flash.converters.bundles import write_bundles
from mlx_flash.converters.split import split
from mlx_flash.errors import FlashError, NotEnoughMemory
from mlx_flash.inspection import verify
from mlx_flash.layers import lookup
from mlx_flash.layers.lookup import Lookup, large_tables, table_arrays
from mlx_flash.memory import beside, places
from mlx_flash.memory.fence import Fence
from mlx_flash.memory.policies import Lru
from mlx_flash.memory.slots import UnitSlots
from mlx_flash.memory.stats import Stats
from mlx_flash.planning.info import look_at
from mlx_flash.planning.plan import make_plan
from mlx_flash.planning.text import plan_text
from mlx_flash.storage.extents import bundle_extent
from mlx_flash.storage.reader import open_reader

ROWS, WIDTH = 2_000, 64
PACKINGS = {
    "unpacked": None,
    "affine": dict(group_size=32, bits=4),
    "mxfp4": dict(group_size=32, bits=4, mode="mxfp4"),
}
CONTEXT = 512
NGRAM = LONGCAT | dict(
    model_type="longcat_flash_ngram",
    hidden_size=192,
    ngram_vocab_size_ratio=3,
    emb_neighbor_num=3,
    emb_split_num=3,
)

GEMMA = make_config("gemma3n")
GEMMA["text_config"]["vocab_size_per_layer_input"] = 4_000


@pytest.fixture
def small_tables(monkeypatch):
    """Tables of any size go to flash, and have three slots."""
    monkeypatch.setattr(lookup, "LEAST_TABLE_BYTES", 1)
    monkeypatch.setattr(beside, "TABLE_SLOTS", 3)


def make_table(packing=None, dtype=mx.float32):
    mx.random.seed(5)
    table = nn.Embedding(ROWS, WIDTH)
    table.weight = mx.random.normal((ROWS, WIDTH)).astype(dtype)
    return table.to_quantized(**packing) if packing else table


def on_flash(table, slots, folder):
    """The table with so many slots, and its reader, which is to be closed."""
    layer = write_bundles(folder / "t.safetensors", "t", table_arrays(table))
    reader = open_reader(2, direct=False)
    extents = [bundle_extent(layer, folder.parent)]
    made = UnitSlots(layer, extents, slots, Lru(), reader, Fence(), Stats(), rows=True)
    if slots == ROWS:
        made.read_all()
    streamed = Lookup(table)
    streamed.attach(made)
    return streamed, reader


# -------------------------------------------------------------------- one table


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("slots", [1, 2, 7, ROWS])
def test_the_same_rows_with_any_number_of_slots(packing, dtype, slots, tmp_path):
    folder = tmp_path / "ffn"
    folder.mkdir()
    table = make_table(PACKINGS[packing], getattr(mx, dtype))
    streamed, reader = on_flash(table, slots, folder)
    rng = np.random.default_rng(0)
    with reader:
        for shape in [(1, 1), (1, 30), (2, 5), (3,), (1, 1), (1, 200)]:
            ids = mx.array(rng.integers(0, ROWS, shape), mx.int32)
            assert mx.array_equal(streamed(ids), table(ids)), shape
        ids = mx.array([[-1, 3, -ROWS]], mx.int64)
        assert mx.array_equal(streamed(ids), table(ids))


def test_a_row_is_read_once_a_call_and_counts_as_no_hit(tmp_path):
    (tmp_path / "ffn").mkdir()
    streamed, reader = on_flash(make_table(), 10, tmp_path / "ffn")
    with reader:
        mx.eval(streamed(mx.array([[7, 7, 8, 7]])))
        mx.eval(streamed(mx.array([[7, 9]])))
        stats = streamed.slots.stats
    assert (stats.rows, stats.rows_read, stats.hits, stats.misses) == (4, 3, 0, 0)


def test_a_table_of_very_many_rows(tmp_path, monkeypatch):
    """No array has an entry for each row; the rows are the same."""
    monkeypatch.setattr(places, "MANY", 1000)
    (tmp_path / "ffn").mkdir()
    table = make_table()
    streamed, reader = on_flash(table, 5, tmp_path / "ffn")
    rng = np.random.default_rng(0)
    with reader:
        for slots in (5, 3, ROWS, 4):
            streamed.slots.resize(slots, 10_000)
            whole = isinstance(streamed.slots.cache.slot_of, np.ndarray)
            assert whole == (slots == ROWS)
            for length in (1, 3, 60, 2, 1):
                ids = mx.array(rng.integers(0, ROWS, (1, length)))
                assert mx.array_equal(streamed(ids), table(ids))


@pytest.mark.parametrize("ids", [[0, ROWS], [-ROWS - 1]])
def test_a_row_that_there_is_not(ids, tmp_path):
    (tmp_path / "ffn").mkdir()
    streamed, reader = on_flash(make_table(), 4, tmp_path / "ffn")
    with reader:
        with pytest.raises(FlashError, match="vocabulary"):
            streamed(mx.array(ids))
        with pytest.raises(FlashError, match="on flash"):
            streamed.update({"weight": mx.zeros((ROWS, WIDTH))})


# -------------------------------------------------------- which tables go there


def test_tables_that_are_only_looked_up(small_tables):
    assert list(large_tables(make_weights(QWEN3))) == ["model.embed_tokens"]
    tied = QWEN3 | dict(tie_word_embeddings=True)
    assert not large_tables(make_weights(tied))
    gemma = list(large_tables(make_weights(GEMMA)))
    assert [path.rsplit(".", 1)[-1] for path in gemma] == ["embed_tokens_per_layer"]
    ngram = list(large_tables(make_weights(NGRAM)))
    assert len(ngram) == 1 + 2 * 3  # of words, and of runs of two and three


def test_a_table_with_more_than_rows_stays_in_memory(small_tables):
    model = make_weights(QWEN3)
    model.model.embed_tokens.global_scale = mx.array(1.0)
    assert not large_tables(model)


def test_small_tables_stay_in_memory(tmp_path):
    folder = write_checkpoint(tmp_path / "source", QWEN3)
    converted = mlx_flash.convert(folder, tmp_path / "flash", progress=False)
    assert "tables" not in json.loads((converted / "flash.json").read_text())
    with mlx_flash.load_model(folder, "1GB") as (model, _):
        assert not model.flash.beside


# ----------------------------------------------------------------- whole models


def least_of(folder):
    with pytest.raises(NotEnoughMemory) as caught:
        mlx_flash.load_model(folder, 5000, context=CONTEXT)
    return caught.value.least_bytes


MODELS = {
    "qwen3_moe": (QWEN3, True, 0),
    "longcat_flash_ngram": (NGRAM, True, 0),
    "gemma3n": (GEMMA, False, 1e-5),
    "llama": (LLAMA | dict(vocab_size=20_000), False, 1e-5),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits", [None, 4])
def test_models_from_the_least_memory_to_all(name, bits, small_tables, tmp_path):
    config, in_place, tolerance = MODELS[name]
    source = check.write_checkpoint(tmp_path / "source", config, bits)
    resident, _ = mlx_load_model(source)
    expected = check.run(resident, 70)
    folder = mlx_flash.convert(source, tmp_path / "flash", progress=False)
    for path in [folder, *([source] if in_place else [])]:
        least = least_of(path)
        for memory in (least, int(1.2 * least), "1GB"):
            with mlx_flash.load_model(path, memory, context=CONTEXT) as (model, _):
                begun = [table.slots.holds_all for table in model.flash.beside]
                actual = check.run(model, 70)
                read = model.flash.stats.rows_read
            assert read if memory == least else True
            assert begun and (memory != "1GB" or all(begun) and not read)
            for a, e in zip(actual, expected, strict=True):
                assert np.ptp(e) > 0
                assert np.abs(a - e).max() <= tolerance * np.abs(e).max(), memory


def test_tables_grow_and_shrink_with_the_budget(small_tables, tmp_path):
    config = QWEN3 | dict(vocab_size=ROWS, hidden_size=256)
    folder = write_checkpoint(tmp_path / "source", config)
    expected = run(mlx_load_model(folder)[0], 1)
    little = int(1.3 * least_of(folder))
    with mlx_flash.load_model(folder, little, context=CONTEXT) as (model, _):
        slots = model.flash.beside[0].slots
        for memory, held in ((little, 3), ("1GB", ROWS), (little, 3), ("1GB", ROWS)):
            model.flash.resize(memory)
            assert_same(run(model, 1), expected)
            assert slots.n_slots == held


def test_the_budget_holds_also_where_tables_are_whole(small_tables, tmp_path):
    config = QWEN3 | dict(vocab_size=20_000)
    folder = write_checkpoint(tmp_path / "source", config)
    table = 20_000 * 64 * 4
    for memory in (least_of(folder), "60MB"):
        with mlx_flash.load_model(folder, memory, context=CONTEXT) as (model, _):
            budget = model.flash.budget
            assert (budget.beside_bytes >= table) == (memory == "60MB")
            used = budget.resident_bytes + budget.beside_bytes + budget.slot_bytes
            used += budget.kv_bytes + budget.workspace_bytes
            assert used == budget.total_bytes


def test_least_memory_is_less_by_the_table(tmp_path, monkeypatch):
    config = QWEN3 | dict(vocab_size=20_000)
    folder = write_checkpoint(tmp_path / "source", config)
    before = least_of(folder)
    monkeypatch.setattr(lookup, "LEAST_TABLE_BYTES", 1)
    assert before - least_of(folder) > 0.9 * 20_000 * 64 * 4


# ----------------------------------------------------------------- the manifest


@pytest.fixture
def converted(small_tables, tmp_path):
    source = write_checkpoint(tmp_path / "source", QWEN3)
    return mlx_flash.convert(source, tmp_path / "flash", progress=False)


def test_a_folder_with_tables_is_of_version_3(converted):
    manifest = json.loads((converted / "flash.json").read_text())
    assert manifest["format_version"] == 3
    [table] = manifest["tables"]
    assert table["module"] == "model.embed_tokens" and table["units"] == 97
    assert not any("thresholds" in x for x in [table, *manifest["layers"]])
    assert "model.embed_tokens.weight" not in mx.load(
        str(converted / "resident.safetensors")
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: m.update(format_version=1), "version 3"),
        (lambda m: m["tables"][0].update(module="model.norm"), "rows"),
        (lambda m: m["tables"][0].update(module="model.nothing"), "does not have"),
        (lambda m: m["tables"][0].update(units=96), "bundles"),
        (lambda m: m["tables"][0]["parts"][0].update(shape=[32, 2]), "rows"),
        (lambda m: m["tables"][0].update(m["layers"][0]), "the same module"),
        (lambda m: m.pop("tables"), "version 1"),
    ],
)
def test_tables_that_contradict_the_files(change, words, converted):
    file = converted / "flash.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(FlashError, match=words):
        mlx_flash.load_model(converted, "1GB")


def test_verify_reads_tables_too(converted):
    passed = []
    verify(converted, passed.append)
    assert "ffn/table_00.safetensors" in passed
    file = converted / "ffn/table_00.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(FlashError, match="table_00"):
        verify(converted, passed.append)


def test_every_part_of_a_split_has_all_tables(converted):
    parts = split(converted, 2, progress=False)
    table = (converted / "ffn/table_00.safetensors").read_bytes()
    for part in parts:
        assert (part / "ffn/table_00.safetensors").read_bytes() == table
        assert json.loads((part / "flash.json").read_text())["format_version"] == 3


def test_figures_speak_of_rows(converted, tmp_path):
    save_tokenizer(converted)
    least = least_of(converted)
    with mlx_flash.load(converted, least, context=CONTEXT) as (model, tokenizer):
        mlx_flash.generate(model, tokenizer, "a b c", max_tokens=4)
        report = model.flash.report()
    assert (report.beside.tables, report.beside.tables_held_whole) == (1, 0)
    assert "embeddings" in str(report)
    assert "97 rows in tables: 1" in look_at(converted).text()
    for name in (converted, tmp_path / "source"):
        plan = make_plan(name, least, context=CONTEXT)
        assert plan.table_bytes == 97 * 64 * 4
        assert abs(plan.least_bytes - least) <= 16_384
        assert plan.bytes_per_token[0] >= 4096
        assert "of embeddings as rows" in plan_text(plan)
