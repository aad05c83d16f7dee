"""`generate` answers as `mlx_lm.generate` does, and says what cannot be."""

import importlib
import json
import sys
from unittest import mock

import pytest
from chat_models import MEMORY, expected_prompt, make_chat_model
from test_commands import refused, run

import mlx_flash
from mlx_flash import prompts

theirs = importlib.import_module("mlx_lm.generate")  # as an attribute, a function


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("plain"), template=None)


def answer(folder, *args, n=8, input=None):
    options = "--model", folder, "--memory", MEMORY, "--json", "-m", n
    return json.loads(run("generate", *args, *options, input=input).stdout)


@pytest.fixture
def encoded(monkeypatch):
    """The token ids of every conversation that a template wrote."""
    seen, real = [], prompts.encode_messages

    def noting(*args):
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(prompts, "encode_messages", noting)
    return seen


# The chat template


def test_a_prompt_is_a_message(folder, encoded):
    data = answer(folder, "w20 w21")
    assert encoded == [expected_prompt(("user", "w20 w21"))]
    assert data["prompt_tokens"] == len(encoded[0])
    raw = answer(folder, "w11 w20 w21 w13 w12", "--ignore-chat-template")
    assert raw["tokens"] == data["tokens"]


def test_what_a_conversation_has_besides(folder, encoded):
    options = "--system-prompt", "w30 w31", "--prefill-response", "w40"
    answer(folder, "-p", "w20", *options)
    messages = ("system", "w30 w31"), ("user", "w20"), ("assistant", "w40")
    assert encoded[-1] == expected_prompt(*messages, goes_on=True)
    answer(folder, "w20", "--chat-template-config", '{"loud": true}')
    assert encoded[-1] == [11, 20, 13, 14, 12]


def their_answer(folder, monkeypatch, capsys, *options):
    """What `mlx_lm.generate` prints with these options, on our loaded model."""
    loaded = mlx_flash.load(folder, MEMORY)
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(theirs, "load", lambda *a, **k: (*loaded, config))
    args = ["generate", "--verbose", "F", *map(str, options)]
    monkeypatch.setattr(sys, "argv", args)
    with loaded:
        theirs.main()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--system-prompt", "w30"),
        ("--prefill-response", "w40 w41"),
        ("--ignore-chat-template",),
        ("--chat-template-config", '{"loud": true}'),
        ("--temp", 1, "--seed", 3, "--top-k", 5),
        ("--temp", 1, "--seed", 3, "--top-p", 0.5),
        ("--temp", 1, "--seed", 3, "--min-p", 0.3, "--min-tokens-to-keep", 2),
        ("--temp", 1, "--seed", 3, "--xtc-probability", 0.9, "--xtc-threshold", 0.01),
        ("--extra-eos-token", "w13"),
    ],
    ids=lambda options: " ".join(map(str, options[-2:])),
)
def test_answers_are_those_of_mlx_lm(folder, monkeypatch, capsys, options):
    prompt = "--prompt", "w20 w21 w22"
    expected = their_answer(folder, monkeypatch, capsys, *prompt, "-m", 12, *options)
    assert answer(folder, *prompt, *options, n=12)["text"] + "\n" == expected


def test_without_a_template_the_text_goes_on(plain_folder):
    assert answer(plain_folder, "w20 w21")["prompt_tokens"] == 2
    message = refused(
        "generate", "w20", "--model", plain_folder, "--system-prompt", "a"
    )
    assert "has no chat template" in message and "--system-prompt" in message


def test_a_template_that_refuses(tmp_path):
    template = "{{ raise_exception('no system role') }}"
    folder = make_chat_model(tmp_path, template)
    message = refused("generate", "w20", "--model", folder, "--memory", MEMORY)
    assert "refuses this conversation: no system role" in message


def test_a_prompt_by_either_name(folder):
    assert answer(folder, "--prompt", "w20") | {"stats": 0} == answer(folder, "w20") | {
        "stats": 0
    }
    assert answer(folder, "-p", "-", input="w20 w21\n")["prompt_tokens"] == 5


# Sampling and ends


def test_penalties_change_what_repeats(folder):
    plain = answer(folder, "w20", n=40)["tokens"]
    assert len(set(plain)) < len(plain) / 2
    for name in ("repetition", "presence", "frequency"):
        options = f"--{name}-penalty", 50, f"--{name}-context-size", 60
        tokens = answer(folder, "w20", *options, n=40)["tokens"]
        assert len(set(tokens)) == len(tokens) > 20


def test_penalties_see_what_the_prompt_cache_holds(folder, tmp_path):
    options = ("--presence-penalty", 50, "--presence-context-size", 99)
    file = "--prompt-cache", tmp_path / "c.safetensors"
    plain = answer(folder, "w20 w21 w22", *options)["tokens"]
    assert answer(folder, "w20 w21 w22", *options, *file)["tokens"] == plain
    again = answer(folder, "w20 w21 w22", *options, *file)
    assert again["cached_tokens"] and again["tokens"] == plain


def test_stop_texts_and_tokens(folder):
    plain = answer(folder, "w20", n=20)
    words = plain["text"].split()
    third = words[2]
    assert third not in words[:2]
    stopped = answer(folder, "w20", "--stop", "nowhere", "--stop", third, n=20)
    assert stopped["text"].split() == words[:2]
    assert stopped["finish_reason"] == "stop" and stopped["generation_tokens"] == 3
    for token in (third, third[1:]):
        ended = answer(folder, "w20", "--extra-eos-token", token, n=20)
        assert ended["text"].split() == words[:2]
        assert ended["finish_reason"] == "stop"


def test_an_answer_that_is_over_at_once_is_explained(folder):
    first = answer(folder, "w20")["text"].split()[0]
    args = "generate", "w20", "--model", folder, "--memory", MEMORY, "-q"
    result = run(*args, "--extra-eos-token", first)
    assert result.stdout == "\n"
    assert result.stderr.splitlines() == [
        f"The answer is empty: its first token, {first}, ends it. Ask otherwise, or "
        "try --ignore-chat-template."
    ]
    assert "--stop text" in run(*args, "--stop", first).stderr


# Wrong usages, a line each


@pytest.mark.parametrize(
    "options, said",
    [
        (["a", "--temperature", "1"], "mlx-flash calls it --temp."),
        (["a", "--n-predict", "5"], "mlx-flash calls it --max-tokens."),
        (["a", "--num-predict=5"], "mlx-flash calls it --max-tokens."),
        (["a", "-n", "5"], "mlx-flash calls it --max-tokens."),
        (["a", "--ctx-size", "5"], "--max-tokens need is reserved."),
        (["a", "--num-ctx", "5"], "--max-tokens need is reserved."),
        (["a", "--threads", "5"], "MLX uses the whole machine"),
        (["a", "-ngl", "99"], "No such option: -ngl."),
        (["a", "--n-gpu-layers", "99"], "MLX uses the whole machine"),
        (["a", "--repeat-penalty", "2"], "--repetition-penalty."),
        (["a", "--image", "cat.png"], "reads text alone"),
        ([], "Missing the prompt. Try: mlx-flash generate"),
        (["a", "-p", "b"], "Give the prompt once"),
        (["a", "--top-k", "-1"], "--top-k"),
        (["a", "--min-p", "2"], "--min-p"),
        (["a", "--temp", "nan"], "'nan' is no number."),
        (["a", "--xtc-threshold", "0.7"], "--xtc-threshold"),
        (["a", "--repetition-penalty", "0"], "--repetition-penalty"),
        (["a", "--chat-template-config", "loud"], "'loud' is no JSON object. Try"),
        (["a", "--ignore-chat-template", "--system-prompt", "b"], "leaves no place"),
    ],
)
def test_wrong_usages(options, said):
    assert said in refused("generate", *options, code=2)


def test_no_token_of_this_model(folder):
    options = "--model", folder, "--extra-eos-token", "<|end|>"
    message = refused("generate", "w20", *options)
    assert "'<|end|>' is no token of this model" in message


def test_every_option_of_mlx_lm_is_there_or_named_with_a_reason():
    from mlx_flash.cli import main
    from mlx_flash.cli.hints import NOTHING, SAME

    for name in ("generate", "chat"):
        module = importlib.import_module(f"mlx_lm.{name}")
        if name not in main.commands:
            continue
        ours = {flag for p in main.commands[name].params for flag in p.opts}
        with mock.patch.object(sys, "argv", [name]):
            parser = module.setup_arg_parser()
        for action in parser._actions:
            for flag in set(action.option_strings) - {"-h", "--help"}:
                assert flag in ours or flag in NOTHING or SAME.get(flag) in ours, flag
