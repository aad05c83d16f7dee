"""`convert --skippable` and `--skip`: what a user sees of it."""

import http.client
import json
import shutil

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import save_tokenizer
from conversions import interrupt
from opt_checkpoints import files_of
from serving import served
from stock_checkpoints import LLAMA, QWEN3, stream, write_checkpoint
from test_adapters import PROMPT, difference, logits, train

import mlx_flash
from mlx_flash.bench.perplexity import perplexity
from mlx_flash.checkpoints.tokenizer import load_tokenizer
from mlx_flash.cli import main
from mlx_flash.converters import conversion
from mlx_flash.converters.calibrate.layerwise import LayerwiseModel
from mlx_flash.converters.calibrate.text import text_tokens
from mlx_flash.converters.source import Source
from mlx_flash.converters.workfolder import WorkFolder
from mlx_flash.errors import FlashError
from mlx_flash.generation import stream_generate
from mlx_flash.prompt_cache import model_identity
from mlx_flash.server import Settings, open_server
from mlx_flash.storage.manifest_reading import read_manifest
from mlx_flash.storage.skipping import MEASURED, Skipping

OPTIONS = {"skippable": True, "calibration_tokens": 512, "progress": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("skip") / "model", LLAMA)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def flash(checkpoint):
    return mlx_flash.convert(checkpoint, checkpoint.parent / "flash", **OPTIONS)


@pytest.fixture
def own(flash, tmp_path):
    return shutil.copytree(flash, tmp_path / "own")


def answer(model, tokenizer, n=12, **options):
    tokenizer.eos_token_ids = set()
    steps = stream_generate(model, tokenizer, PROMPT, max_tokens=n, **options)
    return [step.token for step in steps]


def test_a_run_says_that_it_is_lossy(flash):
    found = read_manifest(flash).skipping
    assert found.measured == MEASURED and sorted(found.perplexity)[0] > 1
    costs = dict(zip(found.measured, found.perplexity, strict=True))
    said = f"skip 50%: lossy, perplexity {costs[0]:,.2f} → {costs[0.5]:,.2f} on calib"
    tokenizer = load_tokenizer(flash)
    for skip in (0.5, None):
        model = stream(flash, 48, skip=skip)
        answer(model, tokenizer)
        report = model.flash.report()
        figures = report.to_dict()
        if skip:
            assert said in str(report) and said in figures["lossy"]
            assert figures["skip"] == 0.5 and report.waits_per_token == 2
        else:
            assert "lossy" not in str(report) and figures["lossy"] is None
            assert figures["skip"] == 0 and report.waits_per_token == 0
        model.flash.close()


def test_fewer_neurons_are_read(flash):
    missed = []
    for skip in (None, 0.5, 0.9):
        model, tokenizer = stream(flash, 48, skip=skip), load_tokenizer(flash)
        answer(model, tokenizer)
        missed.append(model.flash.stats.misses)
        model.flash.close()
    assert missed[0] > missed[1] > missed[2]


@pytest.mark.parametrize("share, nearest", [(0.4, 0.5), (0.1, 0.3), (0.85, 0.9)])
def test_the_nearest_measured_share_is_named(share, nearest):
    found = Skipping((0.0, 1.0), MEASURED, (10.0, 11.0, 12.0, 13.0, 14.0), 9)
    cost = found.perplexity[MEASURED.index(nearest)]
    said = found.cost(share)
    assert f"skip {share:.0%}" in said and f"10.00 → {cost:.2f}" in said
    assert said.endswith(f"(measured at {nearest:.0%})")


def test_thresholds_lie_on_lines_between_shares():
    found = Skipping((0.0, 0.1, 0.4), (), (), 9)
    xs = np.linspace(0, 0.4, 9)
    expected = np.interp(xs, found.shares, (0.0, 1.0, 5.0))
    assert np.allclose([found.threshold((0, 1, 5), x) for x in xs], expected)


def test_drafts_give_the_same_answer(flash):
    answers = []
    for n in (0, 8):
        model, tokenizer = stream(flash, 20, skip=0.5), load_tokenizer(flash)
        options = {"draft_ngrams": 2, "num_draft_tokens": n}
        answers.append(answer(model, tokenizer, 40, **options))
        model.flash.close()
    assert answers[0] == answers[1]


def test_caches_of_other_shares_are_others(flash):
    found = set()
    for skip in (None, 0.0, 0.3, 0.5):
        with mlx_flash.load(flash, "450KB", context=64, skip=skip) as (model, _):
            found.add(model_identity(model.flash))
    assert len(found) == 3  # none and 0 are one


@pytest.mark.parametrize("skip", [None, 0.5])
def test_adapters_of_gates_choose_neurons_too(checkpoint, flash, tmp_path, skip):
    adapter = train(checkpoint, tmp_path / "adapter")
    results = []
    for memory in ("420KB", "5MB"):
        options = {"adapter_path": adapter, "context": 64, "skip": skip}
        with mlx_flash.load(flash, memory, **options) as (model, _):
            results.append(logits(model))
    assert difference(*results) < 1e-4
    with mlx_flash.load(flash, "5MB", skip=skip) as (model, _):
        assert difference(logits(model), results[0]) > 0.1
    if skip is None:
        expected = logits(mlx_lm.load(checkpoint, adapter_path=str(adapter))[0])
        assert difference(results[0], expected) < 1e-4


# What is refused


def test_folders_without_thresholds_are_refused(checkpoint, tmp_path):
    blocks = mlx_flash.convert(checkpoint, tmp_path / "blocks", progress=False)
    with pytest.raises(FlashError, match="no thresholds to skip.*--skippable"):
        mlx_flash.load(blocks, skip=0.5)
    mlx_flash.load(blocks, "5MB", skip=0)[0].flash.close()
    experts = write_checkpoint(tmp_path / "experts", QWEN3)
    with pytest.raises(FlashError, match="no thresholds"):
        mlx_flash.load_model(experts, skip=0.5)


@pytest.mark.parametrize("share", [-0.1, 0.95, 50])
def test_shares_that_cannot_be(flash, share):
    with pytest.raises(FlashError, match="cannot be skipped. Give one from 0 to 0.9"):
        mlx_flash.load(flash, skip=share)


def shorten(manifest):
    manifest["layers"][1]["thresholds"].pop()


def drop(manifest):
    del manifest["layers"][0]["thresholds"]


def lose(manifest):
    del manifest["skipping"]


def fall(manifest):
    manifest["layers"][0]["thresholds"].reverse()


def below(manifest):
    manifest["layers"][0]["thresholds"][0] = -1.0


def endless(manifest):
    manifest["layers"][0]["thresholds"][-1] = 1e999


def unlike(manifest):
    manifest["skipping"]["perplexity"].pop()


def impossible(manifest):
    manifest["skipping"]["perplexity"][2] = float("nan")


def shuffle(manifest):
    manifest["skipping"]["shares"].reverse()


def empty(manifest):
    manifest["skipping"] |= {"measured": [], "perplexity": []}


def words(manifest):
    manifest["layers"][0]["thresholds"][3] = "0.5"


def another_kind(manifest):
    manifest["unit"] = "neuron"


DAMAGES = {
    shorten: "layer 1 has 18 thresholds for 19 shares",
    drop: "layer 0 has 0 thresholds",
    lose: "thresholds for no shares|must be skippable",
    fall: "thresholds of layer 0 do not rise",
    below: "thresholds of layer 0 do not rise",
    endless: "thresholds of layer 0 do not rise",
    unlike: "not every measured share has a perplexity",
    impossible: "a perplexity is impossible",
    shuffle: "shares to skip do not rise",
    empty: "measured shares do not rise",
    words: "thresholds must be float, found '0.5'",
    another_kind: "neurons cannot be skippable",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_manifest_is_one_line(own, damage):
    manifest = json.loads((own / "flash.json").read_text())
    damage(manifest)
    (own / "flash.json").write_text(json.dumps(manifest))
    with pytest.raises(FlashError, match=DAMAGES[damage]) as error:
        mlx_flash.load_model(own)
    assert str(own) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"hidden_act": "drelu", "model_type": "mistral"}, "no gate projection"),
        ({"model_type": "phi3", "rope_scaling": None}, "no gate projection"),
        (QWEN3, "is a mixture of experts"),
    ],
)
def test_models_without_such_gates_cannot_be_converted(tmp_path, changes, said):
    config = changes if changes is QWEN3 else LLAMA | changes
    if config.get("hidden_act"):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        shape = mx.zeros((1,))
        mx.save_safetensors(str(tmp_path / "model" / "model.safetensors"), {"x": shape})
        source = tmp_path / "model"
    else:
        source = write_checkpoint(tmp_path / "model", config)
    with pytest.raises(FlashError, match=f"{said}.*Leave out --skippable"):
        mlx_flash.convert(source, tmp_path / "flash", **OPTIONS)


def test_a_quantised_checkpoint_cannot_be_converted(tmp_path):
    packing = {"group_size": 32, "bits": 4}
    source = write_checkpoint(tmp_path / "model", LLAMA, packing)
    with pytest.raises(FlashError, match="quantised already.*--skippable"):
        mlx_flash.convert(source, tmp_path / "flash", **OPTIONS)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"unit": "neuron"}, "--skippable chooses the unit"),
        ({"rank": 8}, "--rank would be ignored.*gates themselves"),
        ({"recall": 0.9}, "--recall would be ignored"),
    ],
)
def test_options_that_go_with_predictors(checkpoint, tmp_path, options, said):
    with pytest.raises(FlashError, match=said):
        mlx_flash.convert(checkpoint, tmp_path / "flash", **OPTIONS, **options)


# Converting


@pytest.mark.parametrize(
    "owner, name, call, after",
    [
        (LayerwiseModel, "walk", 8, False),
        (WorkFolder, "save_array", 5, True),
        (conversion, "write_bundles", 2, True),
        (WorkFolder, "note", 2, True),
        (conversion, "copy_config", 1, False),
    ],
)
def test_an_interrupted_conversion_goes_on(
    checkpoint, flash, tmp_path, monkeypatch, owner, name, call, after
):
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, call, after)
        with pytest.raises(KeyboardInterrupt):
            mlx_flash.convert(checkpoint, tmp_path / "flash", **OPTIONS)
    with pytest.raises(FlashError, match="other options"):
        mlx_flash.convert(checkpoint, tmp_path / "flash", progress=False)
    again = mlx_flash.convert(checkpoint, tmp_path / "flash", **OPTIONS)
    assert files_of(again) == files_of(flash)


def test_the_perplexities_are_those_of_runs(checkpoint, tmp_path):
    rng = np.random.default_rng(1)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{i}" for i in rng.integers(3, 97, 2600)))
    options = OPTIONS | {"calibration": file}
    folder = mlx_flash.convert(checkpoint, tmp_path / "flash", **options)
    manifest = read_manifest(folder)
    assert manifest.calibration.text == "text.txt"
    held_out = text_tokens(Source(checkpoint), file, 512)[2:]
    found = manifest.skipping
    assert found.tokens == manifest.calibration.held_out_tokens == held_out.size
    for share, expected in zip(found.measured, found.perplexity, strict=True):
        model = stream(folder, 20, skip=share)
        assert perplexity(model, held_out) == pytest.approx(expected, rel=1e-5)
        model.flash.close()


# The command line and the server


def run(*args):
    return CliRunner().invoke(main, list(map(str, args)))


def test_the_command_line(checkpoint, flash, tmp_path):
    out = tmp_path / "cli"
    args = ("convert", checkpoint, "-o", out, "--skippable")
    result = run(*args, "--calibration-tokens", 512)
    assert result.exit_code == 0 and "Measured perplexity by the share" in result.stderr
    info = run("info", out)
    assert "as gated neurons" in info.stdout
    assert "--skip      perplexity by the share skipped: 0% → " in info.stdout
    costs = json.loads(run("info", out, "--json").stdout)["skip_perplexity"]
    assert list(costs) == ["0", "0.3", "0.5", "0.7", "0.9"]
    ask = ("generate", "w5 w6", "--model", out, "--memory", "5MB", "-m", "4")
    result = run(*ask, "--skip", "50%")
    assert "output      skip 50%: lossy" in result.stderr
    assert json.loads(run(*ask, "--json", "--skip", "0.5").stdout)["stats"]["skip"]
    assert "lossy" not in run(*ask).stderr
    result = run(*ask, "--skip", "half")
    assert result.exit_code == 2 and "Try 50%" in result.stderr
    assert "Try 50%" in run(*ask, "--skip", "95%").stderr
    plan = run("plan", out, "--memory", "5MB")
    assert "every gated neuron is needed" in plan.stdout + plan.stderr


def test_the_server_says_so(flash):
    settings = Settings(port=0)
    with open_server(str(flash), "5MB", settings, skip=0.5) as made, served(made):
        pages = []
        for path in ("/api/flash/state", "/metrics"):
            connection = http.client.HTTPConnection("127.0.0.1", made.port, timeout=60)
            connection.request("GET", path)
            pages.append(connection.getresponse().read().decode())
            connection.close()
        assert json.loads(pages[0])["model"]["lossy"].startswith("skip 50%: lossy")
        assert 'lossy="skip 50%: lossy, perplexity' in pages[1]
