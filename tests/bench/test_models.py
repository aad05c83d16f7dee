"""The benchmarks' synthetic models: predictors that cost what was asked, exports that
hold the same weights, and generation that reads what its row says."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_flash import load_model
from mlx_flash.bench import opt, predictors, synthetic, table3
from mlx_flash.bench.decode import decode, random_prompt, random_sampler
from mlx_flash.bench.peers import exports
from mlx_flash.cli import main
from mlx_flash.models.registry import get_model_classes
from mlx_flash.storage.manifest import PREDICTORS
from mlx_flash.storage.manifest_reading import read_manifest

SHAPE = opt.Shape(3, 128, 2048, heads=2, vocab=96, positions=512, dtype="float32")
MEMORY = "50%"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return opt.flash_folder(tmp_path_factory.mktemp("t3"), SHAPE, MEMORY)


def test_predictors_choose_and_miss_what_was_asked(folder):
    """On tokens that they were not calibrated with, the mean of three runs."""
    manifest = read_manifest(folder)
    for layer in manifest.layers:
        assert layer.predictor.predicted_share == pytest.approx(0.1, abs=0.002)
    context = predictors.TOKENS  # as many slots as were reckoned with
    with load_model(folder, MEMORY, context=context) as (model, _):
        late = []
        for seed in (1, 2, 3):
            mx.random.seed(seed)
            sampler = random_sampler(SHAPE.vocab)
            samples, _ = decode(model, random_prompt(128, SHAPE.vocab), 96, sampler)
            late += samples[48:]
    chosen = np.mean([s.spent.asked for s in late]) / (3 * 2048)
    missed = np.mean([s.spent.misses for s in late]) / (3 * 2048)
    assert chosen == pytest.approx(0.1, abs=0.02)
    assert missed == pytest.approx(0.024, abs=0.008)


def test_a_folder_keeps_its_predictors(folder):
    before = (folder / PREDICTORS).stat().st_mtime_ns
    opt.flash_folder(folder.parent, SHAPE, MEMORY)
    assert (folder / PREDICTORS).stat().st_mtime_ns == before


def test_an_interrupted_calibration_leaves_no_predictors(tmp_path, monkeypatch):
    folder = opt.flash_folder(tmp_path, SHAPE)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(predictors, "_bias", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.flash_folder(tmp_path, SHAPE, MEMORY)
    assert read_manifest(folder).predictors is None


def test_ranks_are_the_papers():
    assert [predictors.rank_of(i, 32, 4096) for i in (0, 27, 28, 31)] == [
        128,
        128,
        1024,
        1024,
    ]


def test_table3_rows_read_what_they_say(folder):
    report = table3.run(
        folder, memory=MEMORY, prompt_tokens=6, tokens=3, dense_tokens=2
    )
    naive, hybrid, everything = report.rows
    manifest = read_manifest(folder)
    assert naive.bytes_per_token >= manifest.model_bytes
    assert naive.more["hit_rate"] == 0
    held = hybrid.more["slots"] * manifest.layers[0].unit_bytes
    assert hybrid.bytes_per_token >= manifest.ffn_bytes - held
    assert hybrid.bytes_per_token < manifest.ffn_bytes
    assert 0 < everything.bytes_per_token < 0.5 * hybrid.bytes_per_token
    for row in report.rows:
        parts = row.io_ms + row.cache_ms + row.compute_ms
        assert row.total_ms == pytest.approx(parts)
        assert row.compute_ms > 0


def test_checkpoint_holds_the_same_weights(folder, tmp_path):
    from mlx_lm.utils import load_model as mlx_load_model

    opt.checkpoint(tmp_path / "hf", SHAPE)
    model, _ = mlx_load_model(tmp_path / "hf", get_model_classes=get_model_classes)
    found = dict(tree_flatten(model.parameters()))
    assert found.keys() == SHAPE.weights().keys()
    for name, shape in SHAPE.weights().items():
        assert mx.array_equal(found[name], synthetic.weight(name, shape, "float32"))


def test_llama_cpp_computes_the_same_network(tmp_path, monkeypatch):
    """Its GPT-2 gives the logits of our OPT with GELU, which it approximates."""
    monkeypatch.setattr(synthetic, "SMALL", 0.5)  # positions and FFNs count
    pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp")
    exports.write_gguf(tmp_path / "m.gguf", SHAPE)
    config = SHAPE.config() | {"activation_function": "gelu"}
    model = synthetic.make_model(config)
    names = SHAPE.weights().items()
    model.load_weights([(n, synthetic.weight(n, s, "float32")) for n, s in names])
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    theirs = llama_cpp.Llama(
        str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, verbose=False
    )
    theirs.eval(tokens)
    logits = np.array(theirs.scores[: len(tokens)])
    theirs.close()
    ours = np.array(model(mx.array([tokens]))[0])
    diff = np.abs(ours - logits).max() / np.abs(ours).max()
    assert diff < 2e-3, f"{diff=}"


def test_table3_command(folder):
    from click.testing import CliRunner

    args = ["bench", "table3", "--model", str(folder), "--tokens", "2"]
    args += ["--dense-tokens", "1", "--prompt-tokens", "4"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    assert "SYNTHETIC" in result.stdout and "| all |" in result.stdout
