"""The command line: exit codes, what goes to stdout and what to stderr."""

import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from opt_checkpoints import load, make_checkpoint

import mlx_flash.cli
from mlx_flash.cli import main
from mlx_flash.converters import convert as converting
from mlx_flash.converters.convert import convert

COMMANDS = list(main.commands)
GENERATE_KEYS = {
    "text",
    "tokens",
    "prompt_tokens",
    "generation_tokens",
    "finish_reason",
    "stats",
}
STATS_KEYS = {
    "model_bytes",
    "resident_bytes",
    "predictor_bytes",
    "slot_bytes",
    "memory_budget_bytes",
    "peak_memory_bytes",
    "layers_from_flash",
    "layers_total",
    "prompt_tokens_per_s",
    "tokens_per_s",
    "ms_per_token",
    "bytes_per_token",
    "reads_per_token",
    "read_gb_per_s",
    "hit_rate",
    "predictor_recall",
}
INFO_KEYS = {
    "format_version",
    "unit",
    "layers",
    "units_per_layer",
    "unit_bytes",
    "model_bytes",
    "resident_bytes",
    "predictor_bytes",
    "ffn_bytes",
    "source",
    "dtype",
}
SIDE_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    """A flash folder with predictors and a tokenizer of bytes. Not to be changed."""
    base = tmp_path_factory.mktemp("cli")
    src = make_checkpoint(base / "tiny-opt", ffn_dim=512, max_position_embeddings=256)
    text = base / "text.txt"
    text.write_text("Once upon a time there was a table of bytes. " * 100)
    return convert(
        src,
        base / "flash",
        unit="neuron",
        calibration=text,
        calibration_tokens=640,
        rank=8,
        fit_steps=20,
        progress=False,
    )


@pytest.fixture
def own(flash, tmp_path):
    return Path(shutil.copytree(flash, tmp_path / "own"))


def run(*args, input=None, code=0):
    result = CliRunner().invoke(main, list(map(str, args)), input=input)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def generate(flash, prompt, *options, **kwargs):
    return run("generate", prompt, "--model", flash, "-m", 8, *options, **kwargs)


def refused(*args, code=1, **kwargs):
    """The one line that a command gave up with."""
    result = run(*args, code=code, **kwargs)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("Error: ")
    if code == 1:
        assert len(lines) == 1
    return lines[-1]


def process(*args, **options):
    command = [sys.executable, "-m", "mlx_flash.cli", *map(str, args)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, text=True, **options)


# Help


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(command, flag):
    result = run(*command, flag)
    assert result.stdout.startswith("Usage: ") and result.stderr == ""
    for name in COMMANDS if not command else []:
        assert f"  {name}  " in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command):
    for param in main.commands[command].params:
        if param.param_type_name == "option" and not param.hidden:
            assert param.help, param.name


def test_version():
    result = run("--version")
    assert result.stdout == f"mlx-flash, version {mlx_flash.__version__}\n"


def test_no_command_shows_help():
    result = run(code=2)
    assert "Usage: " in result.output


@pytest.mark.parametrize("args", [["fly"], ["generate"], ["generate", "a", "--wings"]])
def test_usage_errors(args):
    refused(*args, code=2)


def test_help_does_not_load_mlx():
    """In a process of its own: here the tests have loaded it."""
    script = (
        "import sys, mlx_flash, mlx_flash.cli\n"
        "try: mlx_flash.cli.main(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'mlx', 'mlx.core', 'mlx_lm', 'numpy', 'transformers', 'torch'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("Usage: ")
    assert result.stderr == "[]\n"


# generate


def test_text_on_stdout_figures_on_stderr(flash):
    result = generate(flash, "Once", "--memory", "100%")
    data = json.loads(generate(flash, "Once", "--memory", "100%", "--json").stdout)
    assert result.stdout == data["text"] + "\n"
    for word in (
        "prompt ",
        "generation ",
        "flash ",
        "memory ",
        "layers ",
        "predictor ",
    ):
        assert f"\n{word}" in "\n" + result.stderr
    assert "2 of 2 FFN layers from flash" in result.stderr


def test_quiet_prints_the_text_alone(flash):
    result = generate(flash, "Once", "--memory", "100%", "-q")
    assert result.stderr == ""
    assert result.stdout == generate(flash, "Once", "--memory", "100%").stdout


def test_json_has_what_was_promised(flash):
    result = generate(flash, "Once upon", "--memory", "90%", "--json")
    data = json.loads(result.stdout)
    assert result.stderr == ""
    assert data.keys() >= GENERATE_KEYS
    stats = data["stats"]
    assert stats.keys() >= STATS_KEYS
    assert stats["ms_per_token"].keys() == {"io", "cache", "compute", "total"}
    assert data["prompt_tokens"] == 10  # nine bytes and </s>
    assert data["generation_tokens"] == len(data["tokens"]) == 8
    assert data["finish_reason"] == "length"
    facts = json.loads(run("info", flash, "--json").stdout)
    for name in ("model_bytes", "resident_bytes", "predictor_bytes"):
        assert stats[name] == facts[name]
    assert stats["memory_budget_bytes"] == int(0.9 * facts["model_bytes"])
    assert stats["layers_from_flash"] == stats["layers_total"] == 2
    assert 0 < stats["slot_bytes"] < stats["memory_budget_bytes"]
    assert stats["reads_per_token"] > 0 and 0 < stats["hit_rate"] < 1
    ms = stats["ms_per_token"]
    assert abs(ms["total"] - ms["io"] - ms["cache"] - ms["compute"]) < 1e-6
    assert 0 < stats["predictor_recall"] <= 1


def test_tokens_are_those_of_the_text(flash):
    from mlx_flash.loading import load_tokenizer

    data = json.loads(generate(flash, "Once", "--json").stdout)
    assert load_tokenizer(flash).decode(data["tokens"]) == data["text"]


@pytest.mark.parametrize("memory", ["90%", "auto"])
def test_one_token_has_no_time_per_token(flash, memory):
    options = ("-m", 1, "--memory", memory)
    data = json.loads(generate(flash, "Once", *options, "--json").stdout)
    assert data["generation_tokens"] == 1
    assert data["stats"]["tokens_per_s"] is None
    assert "memory " in generate(flash, "Once", *options).stderr


def test_seed_repeats_a_sampled_text(flash):
    def text(seed):
        options = ("--temp", 1, "--seed", seed, "--memory", "100%", "-q")
        return generate(flash, "Once", *options).stdout

    assert text(7) == text(7) == text(7)
    assert len({text(seed) for seed in range(4)}) > 1


def test_budget_changes_time_and_not_text(flash):
    texts = {
        generate(flash, "Once", "-q", "--memory", memory, *options).stdout
        for memory in ("auto", "100%", "90%")
        for options in ((), ("--window", 2), ("--page-cache",))
    }
    assert len(texts) == 2  # "auto" holds every neuron, so nothing is predicted
    exact = {
        generate(flash, "Once", "-q", "--memory", memory, "--no-predictor").stdout
        for memory in ("auto", "100%", "90%")
    }
    assert len(exact) == 1


def test_prompt_from_stdin(flash):
    """As it is: a line end at its end is a token like others."""
    piped = generate(flash, "-", "-q", input="Once\n")
    assert piped.stdout == generate(flash, "Once\n", "-q").stdout
    spaced = json.loads(generate(flash, "-", "--json", input="  Once\n\n").stdout)
    assert spaced["prompt_tokens"] == 1 + len("  Once\n\n")


@pytest.mark.parametrize(
    "prompt, tokens",
    [
        ("Zoë ☃ 你好", 1 + len("Zoë ☃ 你好".encode())),
        ("two\nlines\n\ttab", 1 + 14),
        ("</s>begun by hand", 1 + 13),  # not begun twice
        (" ", None),
        ("-", None),  # stdin, and nothing there
        ("", None),
    ],
)
def test_prompts(flash, prompt, tokens):
    if tokens is None:
        message = refused("generate", prompt, "--model", flash)
        assert "prompt is empty" in message and "Give the text" in message
        return
    data = json.loads(generate(flash, prompt, "--json").stdout)
    assert data["prompt_tokens"] == tokens


def test_prompt_that_is_no_text(flash):
    message = refused("generate", "-", "--model", flash, input=b"caf\xe9 au lait")
    assert "UTF-8" in message and "0xe9" in message
    message = refused("generate", os.fsdecode(b"caf\xe9"), "--model", flash)
    assert "UTF-8" in message


def test_prompt_longer_than_the_positions(flash):
    import transformers

    said = []
    handler = logging.Handler()
    handler.emit = said.append
    transformers.logging.set_verbosity_warning()  # as in a fresh process
    transformers.logging.add_handler(handler)
    message = refused("generate", "a" * 256, "--model", flash)
    assert "257 tokens" in message and "256 positions" in message
    assert "Shorten" in message
    transformers.logging.remove_handler(handler)
    assert not said  # the one line is ours
    data = json.loads(generate(flash, "a" * 250, "--json").stdout)
    assert data["generation_tokens"] == 5  # as many as there are positions


def test_as_many_tokens_as_there_are_positions(flash):
    data = json.loads(generate(flash, "a" * 200, "-m", -1, "--json").stdout)
    assert data["prompt_tokens"] + data["generation_tokens"] == 256


@pytest.mark.parametrize(
    "options, words",
    [
        (["--memory", "7 parrots"], ["--memory", "'7 parrots'", "Try 7GB"]),
        (["--memory", "0"], ["--memory", "'0'"]),
        (["--memory", "-1GB"], ["--memory", "-1GB"]),
        (["--memory", ""], ["--memory"]),
        (["-m", "0"], ["--max-tokens", "at least 1"]),
        (["-m", "-2"], ["--max-tokens", "-1 for no limit"]),
        (["-m", "many"], ["--max-tokens", "many"]),
        (["--temp", "-1"], ["--temp", "-1"]),
        (["--top-p", "1.5"], ["--top-p", "1.5"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--policy", "fifo"], ["--policy", "fifo", "lru"]),
        (["--window", "0"], ["--window"]),
        (["--window", "2", "--policy", "lru"], ["--window", "--policy window"]),
    ],
)
def test_options_that_cannot_be(flash, options, words):
    message = refused("generate", "a", "--model", flash, *options, code=2)
    assert all(word in message for word in words), message


def test_memory_from_the_environment(flash, monkeypatch):
    monkeypatch.setenv("MLX_FLASH_MEMORY", "3MB")
    data = json.loads(generate(flash, "a", "--json").stdout)
    assert data["stats"]["memory_budget_bytes"] == 3_000_000
    monkeypatch.setenv("MLX_FLASH_MEMORY", "much")
    assert "'much'" in refused("generate", "a", "--model", flash, code=2)


def test_budget_that_is_too_small_names_one_that_works(flash):
    message = refused("generate", "a", "--model", flash, "-m", 8, "--memory", "10KB")
    least = message.split("at least --memory ")[1].split()[0]
    data = json.loads(generate(flash, "a", "--memory", least, "--json").stdout)
    assert data["generation_tokens"] == 8


def test_no_demo_model_is_an_error_like_others(monkeypatch, tmp_path):
    monkeypatch.setattr(mlx_flash.cli.common, "DEMO_MODEL", tmp_path / "demo")
    assert str(tmp_path / "demo") in refused("generate", "a")


# Folders that are missing or damaged


@pytest.mark.parametrize(
    "command", [["generate", "a", "--model"], ["info"], ["verify"]]
)
def test_what_is_no_flash_folder(command, tmp_path):
    missing = tmp_path / "nothing"
    assert f"{missing} does not exist" in refused(*command, missing)
    src = make_checkpoint(tmp_path / "plain")
    (src / "model.safetensors").unlink()
    if command != ["info"]:  # to which config.json is enough, as to plan
        message = refused(*command, src)
        assert str(src) in message and "flash.json" in message
        assert f"mlx-flash convert {src}" in message
    file = src / "config.json"
    assert f"{file} is a file" in refused(*command, file)


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda m: m.update(format_version=99),
            ["format version 99", "pip install -U"],
        ),
        (lambda m: m.update(format_version="1"), ["damaged", "format_version"]),
        (lambda m: m.pop("layers"), ["lacks layers"]),
        (lambda m: m.update(unit="atom"), ["unit", "'atom'"]),
        (lambda m: m["layers"][1].update(units=513), ["layer_01", "513"]),
        (lambda m: m["layers"][1].update(unit_bytes=128), ["outside"]),
        (lambda m: m["layers"][0].update(data_offset=1 << 40), ["layer_00", "offset"]),
        (lambda m: m["layers"][0].update(file="../x"), ["outside its folder"]),
        (lambda m: m["layers"][0].update(module="nope"), ["nope"]),
        (
            lambda m: m["layers"][0]["parts"][0].update(shape=[64]),
            ["fc1.weight", "[64]"],
        ),
        (
            lambda m: m["layers"][0]["parts"][1].update(offset=1 << 40),
            ["fc2.weight", "outside"],
        ),
        (lambda m: m["resident"].update(bytes=12), ["resident", "12"]),
    ],
)
def test_manifest_that_lies(own, change, words):
    edit(own / "flash.json", change)
    message = refused("generate", "a", "--model", own)
    assert str(own) in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_manifest_that_is_none(own, text):
    (own / "flash.json").write_text(text)
    for command in (["generate", "a", "--model"], ["info"], ["verify"]):
        assert str(own / "flash.json") in refused(*command, own)


@pytest.mark.parametrize(
    "name",
    ["ffn/layer_01.safetensors", "resident.safetensors", "predictors.safetensors"],
)
def test_files_that_are_cut_or_missing(own, name):
    file = own / name
    file.write_bytes(file.read_bytes()[:-100])
    for command in (["generate", "a", "--model"], ["info"], ["verify"]):
        assert str(file) in refused(*command, own)
    file.unlink()
    for command in (["generate", "a", "--model"], ["info"], ["verify"]):
        message = refused(*command, own)
        assert str(file) in message and "missing" in message


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.pop("hidden_size"), ["config.json", "hidden_size is missing"]),
        (
            lambda c: c.pop("num_attention_heads"),
            ["config.json", "num_attention_heads"],
        ),
        (lambda c: c.update(vocab_size="all"), ["vocab_size"]),
        (lambda c: c.update(model_type="fish"), ["'fish'", "opt"]),
        (lambda c: c.pop("model_type"), ["config.json", "model_type"]),
        (lambda c: c.update(num_hidden_layers=1), ["layers.1"]),
        (lambda c: c.update(num_hidden_layers=3), ["do not fit", "config.json"]),
        (lambda c: c.update(ffn_dim=100), ["config.json"]),
    ],
)
def test_config_that_does_not_fit(own, change, words):
    edit(own / "config.json", change)
    message = refused("generate", "a", "--model", own)
    assert all(word in message for word in words), message


def test_no_tokenizer(own):
    for file in own.glob("tokenizer*"):
        file.unlink()
    message = refused("generate", "a", "--model", own)
    assert f"{own} has no usable tokenizer" in message and "Copy" in message


def test_tokenizer_that_is_damaged(own):
    (own / "tokenizer.json").write_text("{")
    assert f"{own} has no usable tokenizer" in refused("generate", "a", "--model", own)


# info and verify


def test_info(flash):
    data = json.loads(run("info", flash, "--json").stdout)
    assert data.keys() >= INFO_KEYS
    assert data["format_version"] == 1
    assert (data["unit"], data["dtype"], data["source"]) == (
        "neuron",
        "float32",
        "tiny-opt",
    )
    assert (data["layers"], data["units_per_layer"]) == (2, 512)
    weights = load(flash.parent / "tiny-opt" / "model.safetensors").values()
    assert data["model_bytes"] == sum(w.nbytes for w in weights)
    assert data["ffn_bytes"] == 2 * 512 * data["unit_bytes"]
    assert data["model_bytes"] == data["resident_bytes"] + data["ffn_bytes"]
    predictors = load(flash / "predictors.safetensors").values()
    assert data["predictor_bytes"] == sum(w.nbytes for w in predictors)


def test_info_for_a_person(flash):
    result = run("info", flash)
    assert result.stderr == ""
    for word in (str(flash), "opt, relu, float32", "resident", "text.txt", "recall"):
        assert word in result.stdout
    # The last layer's row: its number, weights, units, their size, and its predictor
    assert result.stdout.splitlines()[-1].count(" | ") == 8


def test_verify_a_sound_folder(flash):
    result = run("verify", flash)
    files = ["resident.safetensors", "predictors.safetensors"]
    files += [f"ffn/layer_0{i}.safetensors" for i in range(2)]
    files += SIDE_FILES
    assert result.stdout.splitlines() == [f"ok  {file}" for file in files]


def test_verify_names_what_was_altered(own):
    for name in ("ffn/layer_01.safetensors", "resident.safetensors"):
        with open(own / name, "r+b") as file:
            file.seek(-9, os.SEEK_END)
            byte = file.read(1)
            file.seek(-9, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
    result = run("verify", own, code=1)
    assert result.stdout.splitlines() == [
        "ok  predictors.safetensors",
        "ok  ffn/layer_00.safetensors",
        *[f"ok  {name}" for name in SIDE_FILES],
    ]
    assert result.stderr.startswith(
        f"Error: resident.safetensors, ffn/layer_01.safetensors in {own} differ"
    )
    assert result.stderr.count("\n") == 1


# Processes of their own


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model without an end token and with many positions: it is still at work."""
    base = tmp_path_factory.mktemp("endless")
    src = make_checkpoint(
        base / "model", max_position_embeddings=100_000, eos_token_id=None
    )
    edit(src / "tokenizer_config.json", lambda c: c.pop("eos_token"))
    return convert(src, base / "flash", rank=0, progress=False)


def test_ctrl_c_ends_with_the_text_so_far_and_figures(endless):
    args = ("generate", "Once", "--model", endless, "-m", -1, "--temp", 1)
    with process(*args) as child:
        assert child.stdout.read(3)  # text is coming
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        text, figures = child.communicate(timeout=60)
    assert child.returncode == 130
    assert len(text) > 10 and text.endswith("\n")
    assert "tokens/s" in figures and "FFN layers from flash" in figures
    assert "Traceback" not in figures


def test_ctrl_c_ends_json_too(flash, monkeypatch):
    from mlx_flash import generation

    real = generation.mlx_stream_generate

    def interrupted(*args, **options):
        for i, response in enumerate(real(*args, **options)):
            if i == 3:
                raise KeyboardInterrupt
            yield response

    monkeypatch.setattr(generation, "mlx_stream_generate", interrupted)
    result = run("generate", "a", "--model", flash, "--json", code=130)
    data = json.loads(result.stdout)
    assert data["finish_reason"] == "interrupted"
    assert data["generation_tokens"] == len(data["tokens"]) == 3


def test_ctrl_c_before_the_first_token(flash, monkeypatch):
    from mlx_flash import generation

    def interrupted(*args, **options):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(generation, "mlx_stream_generate", interrupted)
    for options in ((), ("--json",)):
        result = run("generate", "a", "--model", flash, *options, code=130)
        assert "Traceback" not in result.output
    assert json.loads(result.stdout)["tokens"] == []


def test_reader_that_goes_away(endless):
    args = ("generate", "Once", "--model", endless, "-m", -1, "--temp", 1, "-q")
    with process(*args) as child:
        child.stdout.read(1)
        child.stdout.close()
        errors = child.stderr.read()
        child.wait(60)
    assert errors == ""
    assert child.returncode == 1


def test_read_that_fails_on_the_way_ends_the_text(flash, monkeypatch):
    from mlx_flash import generation
    from mlx_flash.errors import FlashError

    real = generation.mlx_stream_generate

    def failing(*args, **options):
        for i, response in enumerate(real(*args, **options)):
            if i == 2:
                raise FlashError("layer_00 could not be read.")
            yield response

    monkeypatch.setattr(generation, "mlx_stream_generate", failing)
    result = run("generate", "a", "--model", flash, code=1)
    assert result.stdout
    assert result.stderr.splitlines()[-1] == "Error: layer_00 could not be read."


# convert


def test_convert_says_what_to_do_next(tmp_path):
    src = make_checkpoint(tmp_path / "model")
    result = run("convert", src, "-o", tmp_path / "flash", "--rank", 0)
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.endswith(f'mlx-flash generate "…" --model {tmp_path / "flash"}')
    result = run("convert", src, "-o", tmp_path / "other", "--rank", 0, "-q")
    assert result.output == ""


def test_convert_takes_every_option(tmp_path, monkeypatch):
    # No option of the command line: a fit that is this short is of no use.
    short = functools.partial(convert, fit_steps=3)
    monkeypatch.setattr(converting, "convert", short)
    src = make_checkpoint(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("Some words. " * 200)
    args = ["--calibration", text, "--calibration-tokens", 256, "--rank", 5]
    args += ["--dtype", "float16", "-q", "--unit", "neuron"]
    dst = ["-o", tmp_path / "flash"]
    run("convert", src, *dst, *args, "--recall", 0.9)
    by_recall = json.loads((tmp_path / "flash" / "flash.json").read_text())
    assert all(0 < x["predictor"]["threshold"] < 1 for x in by_recall["layers"])
    run("convert", src, *dst, *args, "--threshold", 0.25, "--overwrite")
    manifest = json.loads((tmp_path / "flash" / "flash.json").read_text())
    assert manifest["dtype"] == "float16"
    assert manifest["calibration"]["tokens"] == 256
    for layer in manifest["layers"]:
        assert layer["predictor"]["rank"] == 5
        assert np.isclose(layer["predictor"]["threshold"], 0.25)
