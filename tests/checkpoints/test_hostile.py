"""Folders that somebody made to do harm, and such as were damaged by accident."""

import json
import os
import re
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest
import stock_checkpoints as moe
from conftest import save_tokenizer, write_checkpoint

import mlx_flash
from mlx_flash.checkpoints.config import read_config
from mlx_flash.checkpoints.tokenizer import load_tokenizer
from mlx_flash.converters.convert import convert
from mlx_flash.errors import FlashError
from mlx_flash.inspection import record
from mlx_flash.loading import load_model
from mlx_flash.planning.info import look_at
from mlx_flash.storage.safetensors import read_header

TOKENS = mx.array([[5, 17, 3]])


def change(file, **values):
    """Alter a JSON file; a value of None is a null."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def logits(folder):
    with load_model(folder, "1GB") as (model, _):
        result = model(TOKENS)
        mx.eval(result)
    return result


@pytest.fixture(scope="session")
def stock_folder(tmp_path_factory):
    return moe.write_checkpoint(tmp_path_factory.mktemp("stock") / "m", moe.QWEN3)


@pytest.fixture
def experts(stock_folder, tmp_path):
    """A stock checkpoint with experts that a test may damage."""
    return shutil.copytree(stock_folder, tmp_path / "experts")


# Names that are patterns


@pytest.mark.parametrize("name", ["model[1]", "model?", "mode*", "[!x]odel1"])
def test_a_folder_whose_name_is_a_pattern_has_its_own_weights(tmp_path, name):
    folder = moe.write_checkpoint(tmp_path / name, moe.QWEN3)
    expected = logits(shutil.copytree(folder, tmp_path / "same"))
    config = json.loads((folder / "config.json").read_text())
    neighbour = tmp_path / "model1"
    mx.save_safetensors(
        str(folder / "other.safetensors"),
        {
            name: array * 2
            for name, array in mx.load(str(folder / "model.safetensors")).items()
        },
    )
    neighbour.mkdir()
    (neighbour / "config.json").write_text(json.dumps(config))
    os.replace(folder / "other.safetensors", neighbour / "model.safetensors")
    assert not mx.array_equal(logits(neighbour), expected)
    assert mx.array_equal(logits(folder), expected)


# Code


CODE = "import pathlib; pathlib.Path(__file__).with_name('it_ran').touch()\n"


def test_a_tokenizers_code_does_not_run_even_if_stdin_says_yes(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    save_tokenizer(folder)
    body = "from transformers import PreTrainedTokenizerFast\n"
    body += "class Mine(PreTrainedTokenizerFast): pass\n"
    (folder / "mine.py").write_text(CODE + body)
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="Mine",
        auto_map={"AutoTokenizer": [None, "mine.Mine"]},
    )
    program = (
        "import pathlib, sys\n"
        "from mlx_flash.checkpoints.tokenizer import load_tokenizer\n"
        "load_tokenizer(pathlib.Path(sys.argv[1]), sys.argv[2] == 'trusted')\n"
    )

    def run(trust):
        return subprocess.run(
            [sys.executable, "-c", program, str(folder), trust],
            input="y\ny\n",
            capture_output=True,
            text=True,
            env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / trust)},
        )

    def ran():
        return any(tmp_path.rglob("it_ran"))

    run("not")
    assert not ran()
    result = run("trusted")
    assert ran(), result.stderr


def test_a_models_code_does_not_run(experts):
    (experts / "mine.py").write_text(CODE)
    change(experts / "config.json", model_file="mine.py", auto_map={"AutoModel": "x.y"})
    with pytest.raises(FlashError, match="custom"):
        load_model(experts)
    assert not (experts / "it_ran").exists()


# Another model's tokenizer


def test_another_models_tokenizer_is_refused_when_loading(tmp_path):
    source = write_checkpoint(tmp_path / "model", vocab_size=50)
    save_tokenizer(source)
    folder = convert(source, tmp_path / "flash", rank=0, unit="neuron", progress=False)
    with pytest.raises(FlashError, match="token 96, its model knows 50 tokens"):
        mlx_flash.load(folder)


def test_a_token_that_was_added_is_refused_in_the_prompt_alone(tmp_path):
    source = write_checkpoint(tmp_path / "model")
    save_tokenizer(source)
    folder = convert(source, tmp_path / "flash", rank=0, unit="neuron", progress=False)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(FlashError, match="differ from what was noted.*--record"):
        mlx_flash.load(folder)
    record(folder, lambda name: None)
    with mlx_flash.load(folder) as (model, tokenizer):
        assert mlx_flash.generate(model, tokenizer, "w5 w6", max_tokens=2)
        with pytest.raises(FlashError, match="token 97, the model knows 97 tokens"):
            mlx_flash.generate(model, tokenizer, "w5 <new>", max_tokens=2)
        for token in (-1, 97, 2**40):
            with pytest.raises(FlashError, match="another model's tokenizer"):
                mlx_flash.generate(model, tokenizer, [5, token], max_tokens=2)


# Sizes


@pytest.mark.parametrize(
    "size, value",
    [
        ("vocab_size", 2**31),
        ("hidden_size", 2**62),
        ("num_hidden_layers", 10**6),
        ("num_experts", 10**9),
        ("num_attention_heads", 1e300),
        ("max_position_embeddings", -5),
        ("max_position_embeddings", 0),
        ("max_position_embeddings", "many"),
        ("hidden_size", "64"),
        ("hidden_size", [64]),
        ("hidden_size", -64),
        ("num_attention_heads", 0),
        ("rope_theta", {}),
        ("text_config", [1]),
    ],
)
def test_impossible_sizes_are_one_line(experts, own_folder, size, value):
    for folder in (experts, own_folder):
        change(folder / "config.json", **{size: value})
        if size == "rope_theta" and folder is own_folder:
            continue  # OPT has none
        with pytest.raises(FlashError) as error:
            load_model(folder)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ['{"a":' * 100_000, "[" * 100_000, "\x00", '"\\ud800"']
)
@pytest.mark.parametrize(
    "file", ["config.json", "flash.json", "generation_config.json"]
)
def test_json_that_is_none_is_one_line(own_folder, file, text):
    (own_folder / file).write_text(text)
    if file == "generation_config.json" and text == "\x00":
        load_model(own_folder)[0].flash.close()  # mlx-lm does without it
        return
    with pytest.raises(FlashError) as error:
        load_model(own_folder)
    assert "\n" not in str(error.value)


# Files that are none


def make_pipe(path):
    os.mkfifo(path)


def make_endless(path):
    path.symlink_to("/dev/zero")


def make_folder(path):
    path.mkdir()


@pytest.mark.parametrize("make", [make_pipe, make_endless, make_folder])
@pytest.mark.parametrize(
    "file",
    ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"],
)
def test_pipes_devices_and_folders_are_no_files(experts, make, file):
    save_tokenizer(experts)
    (experts / file).unlink(missing_ok=True)
    make(experts / file)
    with pytest.raises(FlashError, match=re.escape(str(experts / file))):
        mlx_flash.load(experts)


@pytest.mark.parametrize("make", [make_pipe, make_endless, make_folder])
def test_a_manifest_that_is_no_file(own_folder, make):
    for file in ("flash.json", "resident.safetensors", "ffn/layer_00.safetensors"):
        (own_folder / file).rename(own_folder / "sound")
        make(own_folder / file)
        with pytest.raises(FlashError, match=re.escape(str(own_folder / file))):
            load_model(own_folder)
        if make is make_folder:
            (own_folder / file).rmdir()
        else:
            (own_folder / file).unlink()
        (own_folder / "sound").rename(own_folder / file)
    logits(own_folder)


def alter_header(path, alter):
    header, start = read_header(path)
    data = path.read_bytes()[start:]
    alter(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def set_dtype(dtype):
    def alter(header):
        next(iter(header.values()))["dtype"] = dtype

    return alter


def set_metadata(header):
    header["__metadata__"] = {"format": 5}


@pytest.mark.parametrize("alter", [set_metadata, set_dtype("F64"), set_dtype("X9")])
def test_headers_that_mlx_refuses_are_one_line(experts, own_folder, alter):
    for path in (experts / "model.safetensors", own_folder / "resident.safetensors"):
        alter_header(path, alter)
        with pytest.raises(FlashError, match=re.escape(str(path.parent))):
            load_model(path.parent)


def test_integers_where_floats_should_be_are_one_line(own_folder):
    alter_header(own_folder / "resident.safetensors", set_dtype("I32"))
    with pytest.raises(FlashError, match="cannot be of int32"):
        load_model(own_folder)


def test_weights_that_cannot_be_read_are_one_line(own_folder, monkeypatch):
    from mlx_flash import sizing

    def cut(*_, **__):
        os.truncate(own_folder / "resident.safetensors", 2000)
        return real(*_, **__)

    real = sizing.make_budget
    monkeypatch.setattr(sizing, "make_budget", cut)
    with pytest.raises(FlashError, match="cannot be read"):
        load_model(own_folder)


# Names


@pytest.mark.parametrize("name", ["ffn/\x00", "ffn/\ud800", "\x1b[2J", "a\nb"])
def test_names_of_no_file_are_one_printable_line(own_folder, name):
    raw = json.loads((own_folder / "flash.json").read_text())
    for entry, field in (
        (raw["layers"][0], "file"),
        (raw["layers"][0], "module"),
        (raw["resident"], "file"),
    ):
        before, entry[field] = entry[field], name
        (own_folder / "flash.json").write_text(json.dumps(raw))
        with pytest.raises(FlashError) as error:
            load_model(own_folder)
        assert str(error.value).isprintable()
        entry[field] = before


def test_info_prints_no_escape_sequences(own_folder):
    change(own_folder / "flash.json", source="\x1b[2Jmodel\nand more")
    text = look_at(own_folder).text()
    assert "\x1b" not in text and r"\x1b[2Jmodel and more" in text


def test_a_model_type_is_printable(experts):
    change(experts / "config.json", model_type="\x1b[2J")
    with pytest.raises(FlashError, match="names no model_type"):
        read_config(experts)


def test_a_folder_without_limit_of_positions(experts):
    change(experts / "config.json", max_position_embeddings=None)
    read_config(experts)
