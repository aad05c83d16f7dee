"""`mlx-flash bench`: what is read is what is claimed, on models of a few kilobytes."""

import json

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from machine_profile import PROFILE
from mlx.utils import tree_flatten

from mlx_flash import FlashError, load_model
from mlx_flash.bench import methods, opt, sweep, synthetic, table2
from mlx_flash.bench.landing import KeepNothing, bundled, unbundled
from mlx_flash.bench.report import Column, Report, Row, Sample
from mlx_flash.bench.selections import Selections, calibrated, miss_share
from mlx_flash.cli import main
from mlx_flash.memory.policies import Window
from mlx_flash.memory.slot_cache import SlotCache
from mlx_flash.memory.stats import Stats
from mlx_flash.storage.manifest_reading import read_manifest

SHAPE = opt.Shape(2, 64, 512, heads=2, vocab=96, positions=256, dtype="float32")
SMALL = ["--shape", "2x64x512", "--vocab", "96"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return opt.flash_folder(tmp_path_factory.mktemp("bench"), SHAPE)


@pytest.fixture(scope="module")
def paged(tmp_path_factory):
    """Up rows and down columns of a whole page: reads are then what is asked for."""
    shape = opt.Shape(2, 1024, 512, 8, 96, 64, dtype="float32")
    return opt.flash_folder(tmp_path_factory.mktemp("paged"), shape)


@pytest.fixture(scope="module")
def rows(paged):
    report = table2.run(paged, tokens=6, dense_tokens=2, rounds=2)
    return {row.name: row for row in report.rows}


def test_modelled_times_follow_from_the_bytes_and_the_profile(paged, monkeypatch):
    """Shown only where this machine was probed."""
    options = {"tokens": 2, "dense_tokens": 1, "rounds": 1}
    monkeypatch.setattr(table2, "load_profile", lambda: None)
    rows = table2.run(paged, **options).rows
    assert all("modelled_io_ms" not in row.more for row in rows)
    monkeypatch.setattr(table2, "load_profile", lambda: PROFILE)
    rows = {row.name: row for row in table2.run(paged, **options).rows}
    modelled = {name: row.more["modelled_io_ms"] for name, row in rows.items()}
    for name in ("naive", "hybrid"):
        expected = 1e3 * rows[name].bytes_per_token / PROFILE.sequential_bytes_per_s
        assert modelled[name] == pytest.approx(expected)
    # Apart, the same bytes are twice the reads of half the length.
    assert modelled["windowing"] > modelled["bundling"] > 0


def test_row_is_mean_and_deviation_of_its_samples():
    samples = [
        Sample(Stats(3, 1, bytes_read=10, reads=1, io_s=0.001), 0.003),
        Sample(Stats(1, 3, bytes_read=30, reads=3, io_s=0.003), 0.005),
    ]
    row = Row.of("a", samples, 7, speedup=2.5)
    means = row.io_ms, row.total_ms, row.bytes_per_token, row.reads_per_token
    assert means == pytest.approx((2, 4, 20, 2))
    assert row.std["io_ms"] == pytest.approx(2**0.5)
    assert row.get("hit_rate") == 0.5 and row.to_json()["speedup"] == 2.5


def test_unmeasured_is_none_and_a_dash():
    row = Row.of("a", [Sample(Stats(io_s=0.001, bytes_read=10))], 7)
    other = Row("b", more={"error": "does not fit"})
    columns = [Column("I/O", "io_ms"), Column("compute", "compute_ms")]
    text = Report("t", [row, other], columns, ["note"], {}).markdown()
    assert "compute" not in text and "| b | – |" in text
    assert text.endswith("b: does not fit")


def test_sample_divides_the_time_of_a_token():
    sample = Sample(Stats(io_s=0.1, cache_s=0.05, bytes_read=3), total_s=0.4)
    assert sample.compute_ms == pytest.approx(250)
    assert sample.total_ms == pytest.approx(400)
    assert Sample(Stats()).compute_ms is None


def test_calibrated_trace_selects_and_misses_what_was_asked():
    noise = calibrated(2048, 0.1, 500, 0.024, Window(4))
    chosen = list(Selections(2048, 0.1, noise, seed=3).tokens(120))
    assert {len(c) for c in chosen} == {205}
    missing = miss_share(chosen, 2048, 500, Window(4), warm=30)
    assert missing == pytest.approx(0.024, abs=0.004)


def test_keep_nothing_misses_everything():
    cache = SlotCache(8, 8, KeepNothing())
    for _ in range(2):
        (wave,) = cache.waves(np.arange(5))
        assert len(wave.missing) == 5


def test_weights_follow_from_their_names():
    for part in ("fc1", "q_proj"):
        a = synthetic.weight(f"x.{part}.weight", (6, 64), "float16")
        same = synthetic.weight(f"x.{part}.weight", (6, 64), "float16")
        other = synthetic.weight(f"y.{part}.weight", (6, 64), "float16")
        assert mx.array_equal(a, same)
        assert not mx.array_equal(a, other)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_have_the_spread_of_a_projection(dtype):
    a = synthetic.weight("x.q_proj.weight", (256, 256), dtype).astype(mx.float32)
    assert mx.isfinite(a).all() and abs(a.mean().item()) < 1e-3
    assert 0.5 / 16 < a.std().item() <= 1 / 16


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_tenth_of_the_neurons_is_active(dtype):
    """And their up rows have a low rank, so that a predictor finds them."""
    up = synthetic.weight("x.fc1.weight", (2048, 256), dtype).astype(mx.float32)
    bias = synthetic.weight("x.fc1.bias", (2048,), dtype).astype(mx.float32)
    x = mx.random.normal((64, 256), key=mx.random.key(0))
    active = (x @ up.T + bias > 0).astype(mx.float32).mean().item()
    assert active == pytest.approx(0.1, abs=0.02)
    sizes = np.linalg.svd(np.array(up), compute_uv=False) ** 2
    assert sizes[: synthetic.UP_RANK].sum() > 0.85 * sizes.sum()


def test_flash_folder_is_the_model(folder):
    """Every neuron computed from flash gives what the weights give in memory."""
    names = SHAPE.weights()
    model = synthetic.make_model(SHAPE.config())
    model.load_weights(
        [(n, synthetic.weight(n, s, "float32")) for n, s in names.items()]
    )
    tokens = mx.array([[3, 1, 4, 1, 5]])
    loaded = load_model(folder, "70%", predictor=False, context=64)
    with loaded as (streamed, _):
        diff = mx.abs(streamed(tokens) - model(tokens)).max().item()
    assert diff < 1e-4, f"{diff=}"
    size = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    assert read_manifest(folder).model_bytes == size == SHAPE.nbytes


def test_folder_of_another_shape_is_refused(folder):
    other = opt.Shape(3, 64, 512, heads=2, vocab=96, dtype="float32")
    with pytest.raises(FlashError, match="other sizes"):
        opt.flash_folder(folder.parent, other)


def test_a_disk_too_small_is_refused_before_writing(tmp_path):
    with pytest.raises(FlashError, match="GB free"):
        synthetic.have_room(tmp_path / "x", 10**18)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [opt.checkpoint, opt.write_flash])
def test_an_interrupted_model_is_not_left_behind(tmp_path, monkeypatch, write):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "progress", interrupted)
    monkeypatch.setattr(opt, "progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "model", SHAPE)
    assert not list(tmp_path.iterdir())


def test_layouts_cover_a_layer_once(folder):
    layer = read_manifest(folder).layers[0]
    (whole,) = bundled(layer, folder)
    up, down = unbundled(layer, folder)
    assert (whole.offset, whole.stride) == (layer.data_offset, layer.unit_bytes)
    assert up.offset == layer.data_offset
    assert down.offset == up.offset + layer.units * up.stride
    assert down.offset + layer.units * down.stride == whole.offset + layer.nbytes


def test_naive_reads_the_whole_model(paged, rows):
    manifest = read_manifest(paged)
    files = [paged / manifest.resident.file]
    files += [paged / layer.file for layer in manifest.layers]
    size = sum(file.stat().st_size for file in files)
    assert size <= rows["naive"].bytes_per_token <= size + 4096 * len(files)


def test_hybrid_reads_what_it_does_not_hold(paged, rows):
    manifest = read_manifest(paged)
    slots = round(0.24 * 512) * 2 * manifest.layers[0].unit_bytes
    unheld = manifest.ffn_bytes - slots
    read = rows["hybrid"].bytes_per_token
    assert read == pytest.approx(unheld, abs=2 * (16384 + 4096))


def test_each_part_of_the_method_reads_less(rows):
    assert rows["predictor"].more.get("hit_rate") is None
    window, bundle = rows["windowing"], rows["bundling"]
    assert window.reads_per_token < rows["predictor"].reads_per_token
    assert bundle.reads_per_token < window.reads_per_token
    selected = 2 * round(0.10 * 512) * 8192
    assert rows["predictor"].bytes_per_token == selected
    assert bundle.bytes_per_token == window.bytes_per_token < selected
    assert window.more["hit_rate"] == bundle.more["hit_rate"] > 0.5
    assert all(row.compute_ms is None for row in rows.values())


def test_table2_refuses_experts(folder, monkeypatch):
    manifest = read_manifest(folder)
    object.__setattr__(manifest, "unit", "expert")
    monkeypatch.setattr(methods, "read_manifest", lambda _: manifest)
    with pytest.raises(FlashError, match="about neurons"):
        table2.run(folder)


def test_sweep_reads_less_the_more_it_holds(folder):
    before = mx.get_active_memory()  # of other tests
    report = sweep.run(folder, ("65%", "85%", "1KB"), 3, 5, 1)
    small, large, refused = report.rows
    assert small.bytes_per_token > large.bytes_per_token > 0
    assert small.more["hit_rate"] < large.more["hit_rate"]
    assert small.memory_bytes - before <= small.more["budget_bytes"]
    assert "needs at least" in refused.more["error"]


def test_table2_command(tmp_path):
    runner = CliRunner()
    target = tmp_path / "t.json"
    args = ["bench", "table2", *SMALL, "--tokens", "2", "--rounds", "1"]
    args += ["--folder", str(tmp_path / "kept"), "--json", str(target)]
    result = runner.invoke(main, args)
    assert result.exit_code == 0, result.output
    assert "SYNTHETIC" in result.stdout and "| bundling |" in result.stdout
    found = json.loads(target.read_text())
    assert {"machine", "command", "cache_state", "options"} <= set(found)
    keys = {"name", "io_ms", "cache_ms", "compute_ms", "total_ms", "bytes_per_token"}
    keys |= {"reads_per_token", "memory_bytes", "std", "tokens"}
    assert all(keys <= set(row) for row in found["rows"])


def test_sweep_command_draws(folder, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "s.png"
    args = ["bench", "sweep", "--model", str(folder), "--memory", "65%", "--memory"]
    args += ["85%", "--tokens", "2", "--repeats", "1", "--plot", str(plot)]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_wrong_shape_is_named():
    result = CliRunner().invoke(main, ["bench", "table2", "--shape", "7 parrots"])
    assert result.exit_code == 2 and "32x4096x16384" in result.stderr
