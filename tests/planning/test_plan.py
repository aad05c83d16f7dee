"""Plans: the sizes that a run will really have, from configuration alone."""

import dataclasses
import json

import mlx.core as mx
import pytest
import stock_checkpoints as moe
from click.testing import CliRunner
from fake_hub import NAME
from machine_profile import PROFILE
from opt_checkpoints import files_of, make_checkpoint
from published import ELSEWHERE, write_published

from mlx_flash.assembly import assemble
from mlx_flash.cli import main
from mlx_flash.converters.convert import convert
from mlx_flash.errors import FlashError
from mlx_flash.planning.outline import outline
from mlx_flash.planning.plan import make_plan
from mlx_flash.profile import save_profile

PACKED = {"group_size": 32, "bits": 4}


@pytest.fixture(autouse=True)
def no_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("MLX_FLASH_PROFILE", raising=False)


def run(*args, code=0):
    result = CliRunner().invoke(main, ["plan", *map(str, args)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def checkpoint_of(kind, folder):
    if kind == "opt":
        return make_checkpoint(folder)
    config, packing = {
        "llama": (moe.LLAMA, None),
        "llama 4 bits": (moe.LLAMA, PACKED),
        "qwen3_moe": (moe.QWEN3, None),
        "qwen3_moe 4 bits": (moe.QWEN3, PACKED),
        "nemotron_h": (moe.NEMOTRON, None),
        # FFNs that give zeros, in some of the layers: these become blocks
        "dense nemotron_h": (
            moe.NEMOTRON | {"hybrid_override_pattern": ["M", "-", "*", "-"]},
            None,
        ),
    }[kind]
    return moe.write_checkpoint(folder, config, packing)


KINDS = [
    "opt",
    "llama",
    "llama 4 bits",
    "qwen3_moe",
    "qwen3_moe 4 bits",
    "nemotron_h",
    "dense nemotron_h",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_planned_as_it_will_be_converted(kind, tmp_path):
    src = checkpoint_of(kind, tmp_path / "model")
    planned = outline(src)
    options = {"rank": 0} if kind == "opt" else {}
    real = assemble(convert(src, tmp_path / "flash", progress=False, **options), True)
    for name in ("unit", "model_type", "dtype", "ffn_bytes", "model_bytes"):
        assert getattr(planned.manifest, name) == getattr(real.manifest, name), name
    assert planned.manifest.resident.bytes == real.manifest.resident.bytes
    for mine, layer in zip(planned.manifest.layers, real.manifest.layers, strict=True):
        assert (mine.module, mine.units) == (layer.module, layer.units)
        assert mine.unit_bytes == layer.unit_bytes
        assert [p.bytes for p in mine.parts] == [p.bytes for p in layer.parts]
    assert planned.shapes == real.shapes


@pytest.mark.parametrize("kind", KINDS)
def test_plan_of_a_flash_folder_has_its_figures(kind, tmp_path):
    src = checkpoint_of(kind, tmp_path / "model")
    options = {"rank": 0} if kind == "opt" else {}
    flash = convert(src, tmp_path / "flash", progress=False, **options)
    plan = make_plan(flash, "1GB", PROFILE, context=16)
    assert plan.kind == "flash folder" and not plan.convert
    assert plan.download_bytes == plan.disk_bytes == 0
    assert plan.tokens_per_s[0] > 0


def test_experts_in_place_need_no_conversion(tmp_path):
    src = checkpoint_of("qwen3_moe", tmp_path / "model")
    plan = make_plan(src, "1GB", context=16)
    assert (plan.unit, plan.convert, plan.disk_bytes) == ("expert", False, 0)
    assert plan.model_bytes == assemble(src, True).manifest.model_bytes


def test_experts_stored_one_by_one_need_none_either(tmp_path):
    src = moe.write_original(tmp_path / "model", moe.QWEN3)
    plan = make_plan(src, "1GB", context=16)
    assert (plan.unit, plan.convert, plan.disk_bytes) == ("expert", False, 0)
    assert plan.model_bytes == assemble(src, True).manifest.model_bytes


def test_experts_that_lie_transposed_are_converted_first(tmp_path):
    lay_out, _ = ELSEWHERE["qwen3_vl_moe"]
    src = write_published(tmp_path / "model", "qwen3_vl_moe", lay_out)
    plan = make_plan(src, "1GB", context=16)
    assert plan.convert and plan.disk_bytes == plan.model_bytes


def test_least_and_best_budgets_are_what_they_say(tmp_path):
    src = only_config(tmp_path / "model")
    some = make_plan(src, "80%", context=16)
    least = make_plan(src, some.least_bytes, context=16)
    assert 0 < least.held_share < some.held_share < 1
    with pytest.raises(FlashError, match="needs at least"):
        make_plan(src, some.least_bytes // 2, context=16)
    best = make_plan(src, some.best_bytes, context=16)
    assert best.held_share == 1 and best.layers_held_whole == best.layers == 2
    assert best.bytes_per_token == (0, 0) and best.slow is None


def test_dense_models_are_said_to_be_slow_and_why(tmp_path):
    src = only_config(tmp_path / "model")
    plan = make_plan(src, "80%", PROFILE, context=16)
    missing = (1 - plan.held_share) * plan.ffn_bytes
    assert plan.bytes_per_token == pytest.approx((missing, missing))
    assert "dense: every token needs every weight" in plan.slow
    assert "at 3.2 GB/s" in plan.slow
    assert "every block is needed" in plan.assumed[0]


def test_a_range_spans_chance_and_locality(tmp_path):
    src = checkpoint_of("qwen3_moe", tmp_path / "model")
    plan = make_plan(src, "75%", PROFILE, context=16)
    assert 0 < plan.held_share < 1
    low, high = plan.bytes_per_token
    expert_bytes = plan.ffn_bytes / (2 * 8)
    by_chance = 2 * 3 * (1 - plan.held_share) * expert_bytes
    assert low < by_chance <= high < 1.2 * by_chance + 2 * 9 * 4096 * 2
    assert plan.tokens_per_s[0] < plan.tokens_per_s[1]
    known = make_plan(src, "75%", PROFILE, context=16, hit_rate=1.0)
    assert known.bytes_per_token == (0, 0)
    assert "100% of the units found in memory, as given" in known.assumed


def test_predictors_of_a_checkpoint_are_those_convert_makes(tmp_path):
    src = make_checkpoint(tmp_path / "model", ffn_dim=512, max_position_embeddings=64)
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a table of bytes. " * 40)
    options = dict(calibration=text, calibration_tokens=320, unit="neuron", fit_steps=2)
    flash = convert(src, tmp_path / "flash", progress=False, **options)
    planned, real = outline(src).manifest, outline(flash).manifest
    assert planned.predictor_bytes == real.predictor_bytes > 0
    plan = make_plan(flash, "1GB", PROFILE, context=16)
    assert "predicted, as at conversion" in plan.assumed[0]
    assert "the paper's for OPT" in make_plan(src, "1GB", context=16).assumed[0]


def only_config(folder, **changes):
    """A dense model of 51 MB of which there is nothing but config.json."""
    folder.mkdir()
    config = moe.LLAMA | {"intermediate_size": 32768, "dtype": "float32"} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# On the hub


@pytest.mark.parametrize("kind", ["opt", "llama", "qwen3_moe 4 bits"])
def test_of_the_hub_only_configuration_comes(hub, tmp_path, kind):  # noqa: F811
    src = checkpoint_of(kind, tmp_path / "model")
    config = json.loads((src / "config.json").read_text()) | {"dtype": "float32"}
    (src / "config.json").write_text(json.dumps(config))
    hub.files = files_of(src)
    data = json.loads(run(NAME, "--memory", "1GB", "--context", 16, "--json").stdout)
    assert not [f for f in hub.fetched if f.endswith(".safetensors")]
    local = make_plan(src, "1GB", context=16)
    assert data["model_bytes"] == local.model_bytes
    assert data["resident_bytes"] == local.resident_bytes
    weights = [v for k, v in hub.files.items() if k.endswith(".safetensors")]
    assert data["download_bytes"] == sum(map(len, weights))
    assert local.download_bytes == 0


def test_a_flash_folder_on_the_hub(hub, tmp_path):  # noqa: F811
    src = checkpoint_of("llama", tmp_path / "model")
    flash = convert(src, tmp_path / "flash", progress=False)
    hub.files = files_of(flash)
    plan = make_plan(NAME, "1GB", context=16)
    assert plan.kind == "flash folder"
    names = ("resident.safetensors", "ffn/layer_00.safetensors")
    assert plan.download_bytes > sum(len(hub.files[n]) for n in names)
    assert not [f for f in hub.fetched if f.endswith(".safetensors")]


def test_a_config_without_dtype_is_settled_by_a_header(hub, tmp_path):  # noqa: F811
    src = checkpoint_of("llama", tmp_path / "model")
    config = json.loads((src / "config.json").read_text())
    assert "dtype" not in config and "torch_dtype" not in config
    hub.files = files_of(src)
    assert make_plan(NAME, "1GB", context=16).dtype == "float32"


def checkpoint_of_two_dtypes(folder, share):
    """A llama's largest tensor, and others up to a share of all values, in float32."""
    moe.write_checkpoint(folder, moe.LLAMA, dtype=mx.float16)
    path = str(folder / "model.safetensors")
    weights = mx.load(path)
    total = sum(array.size for array in weights.values())
    chosen = 0
    for name in sorted(weights, key=lambda n: weights[n].size, reverse=True):
        if not chosen or chosen + weights[name].size <= share * total:
            chosen += weights[name].size
            weights[name] = weights[name].astype(mx.float32)
    mx.save_safetensors(path, weights)
    return folder


@pytest.mark.parametrize("share", [0.0, 0.45])
@pytest.mark.parametrize("remote", [False, True])
def test_the_dtype_is_that_of_most_values(hub, tmp_path, share, remote):  # noqa: F811
    """Neither the largest tensor decides, nor bytes, of which float32 has more."""
    src = checkpoint_of_two_dtypes(tmp_path / "model", share)
    hub.files = files_of(src)
    assert outline(NAME if remote else src).manifest.dtype == "float16"


def test_nothing_says_the_dtype(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(moe.LLAMA))
    message = run(folder, code=1).stderr
    assert message.startswith("Error: ") and "which dtype" in message
    (folder / "config.json").write_text(json.dumps(moe.LLAMA | {"dtype": "bfloat16"}))
    assert "bfloat16" in run(folder, "--memory", "1GB", "--context", 16).stdout


def test_unknown_packing_is_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    strange = {"quantization_config": {"quant_method": "hqq"}}
    (folder / "config.json").write_text(json.dumps(moe.LLAMA | strange))
    assert "(hqq) whose sizes cannot be told" in run(folder, code=1).stderr


def test_nothing_to_bring_from_flash(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    config = moe.MAMBA | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "no FFN that can be brought" in run(folder, code=1).stderr


# The command


def test_text_without_a_profile_says_how_to_get_one(tmp_path):
    src = checkpoint_of("opt", tmp_path / "model")
    result = run(src, "--memory", "1GB", "--context", 16)
    assert result.stderr == ""
    assert "no profile yet. Make one: mlx-flash probe" in result.stdout
    assert f"Next: mlx-flash convert {src} -o model-flash" in result.stdout
    data = json.loads(run(src, "--memory", "1GB", "--context", 16, "--json").stdout)
    assert data["tokens_per_s"] is None and data["first_token_s"] is None
    assert data["prompt_bytes"] is data["prompt_s"] is None


def test_text_with_a_profile(tmp_path, monkeypatch):
    src = only_config(tmp_path / "model")
    path = tmp_path / "p.json"
    save_profile(PROFILE, path)
    args = (src, "--memory", "80%", "--context", 16)
    told = run(*args, "--profile", path).stdout
    assert "tokens/s, modelled" in told and "machine      a test" in told
    assert "This will be slow, because it is dense" in told
    save_profile(dataclasses.replace(PROFILE, cold=False), path)
    monkeypatch.setenv("MLX_FLASH_PROFILE", str(path))
    assert "not surely cold" in run(*args).stdout
    assert "M1 Max" in run(*args, "--profile", "m1-max-paper").stdout
    assert "no profile" in run(*args, "--profile", "nothing", code=1).stderr


def test_the_first_token_in_parts(tmp_path):
    """What a prompt reads, how fast it is, and where its time goes."""
    src = only_config(tmp_path / "model")
    plans = [
        make_plan(src, "80%", PROFILE, context=256, prompt_tokens=n) for n in (1, 200)
    ]
    for plan in plans:
        total = sum(plan.prompt_s.values())
        assert plan.prompt_s.keys() == {"io", "cache", "compute", "wait"}
        assert plan.first_token_s == pytest.approx(plan.load_s + total)
        assert plan.prompt_tokens_per_s == pytest.approx(plan.prompt_tokens / total)
    # A model that has just been loaded has nothing in the slots of a part of a layer.
    assert plans[0].prompt_bytes == pytest.approx(plans[0].ffn_bytes)
    assert plans[1].prompt_bytes > plans[0].prompt_bytes > 0
    path = tmp_path / "p.json"
    save_profile(PROFILE, path)
    told = run(src, "--memory", "80%", "--context", 256, "--profile", path).stdout
    line = next(x for x in told.splitlines() if x.startswith("prompt "))
    assert "tokens/s" in line and "MB read" in line and " io + " in line
