"""A trained model from flash answers token for token as mlx-lm does in memory.

    python -m pytest tests/test_smollm2.py -m slow -s

MLX_FLASH_SMOLLM2 names a folder with SmolLM2-135M-Instruct as safetensors.
"""

import gc
import json
import os
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from click.testing import CliRunner

import mlx_flash
from mlx_flash.cli import main

SOURCE = os.environ.get("MLX_FLASH_SMOLLM2")
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue? Answer in one sentence.",
)
SYSTEM = "You are a helpful assistant."
MAX_TOKENS = 40
MEMORY = "60%"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        SOURCE is None, reason="MLX_FLASH_SMOLLM2 names no folder of SmolLM2"
    ),
]


def message(question):
    return [{"role": "user", "content": question}]


def answer(model, tokenizer, messages):
    """mlx-lm's token ids, the last of which ends the answer unless it was cut off."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    steps = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=MAX_TOKENS)
    return [step.token for step in steps]


@dataclass
class Expected:
    """mlx-lm's own answers, with the model in memory: token ids and texts.

    Attributes:
        alone: Of each question as a conversation of its own.
        told: The same with a system prompt.
        talk: Of the questions one after the other.
    """

    alone: list[list[int]]
    told: list[tuple[list[int], str]]
    talk: list[tuple[list[int], str]]


@pytest.fixture(scope="module")
def expected():
    """All of it at once: the model leaves memory before another is measured."""
    model, tokenizer = mlx_lm.load(SOURCE)
    found = Expected([], [], [])
    system = [{"role": "system", "content": SYSTEM}]
    said = list(system)
    for question in QUESTIONS:
        found.alone.append(answer(model, tokenizer, message(question)))
        said += message(question)
        for messages, kept in (
            ([*system, *message(question)], found.told),
            (said, found.talk),
        ):
            tokens = answer(model, tokenizer, messages)
            kept.append((tokens, tokenizer.decode(tokens, skip_special_tokens=True)))
        said.append({"role": "assistant", "content": found.talk[-1][1]})
    del model
    gc.collect()
    mx.clear_cache()
    return found


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "smollm2-flash"
    return mlx_flash.convert(Path(SOURCE), folder, progress=False)


def command(*args, input=None):
    result = CliRunner().invoke(main, list(map(str, args)), input=input)
    assert result.exit_code == 0, result.output
    return result


def say(client, stats, tokens):
    """A row of the table in docs/benchmarks.md, of which memory is held to."""
    used, given = stats["peak_memory_bytes"], stats["memory_budget_bytes"]
    assert used <= given
    print(
        f"\n| {client} | {len(QUESTIONS)} of {len(QUESTIONS)} | {tokens} | "
        f"{used / 1e6:.0f} of {given / 1e6:.0f} MB | {stats['hit_rate']:.0%} | "
        f"{stats['tokens_per_s']:.1f} |"
    )


def test_generate(flash, expected):
    args = "--model", flash, "--memory", MEMORY, "-m", MAX_TOKENS, "--json"
    for question, tokens in zip(QUESTIONS, expected.alone, strict=True):
        found = json.loads(command("generate", question, *args).stdout)
        assert found["tokens"] == tokens, question
        assert found["stats"]["layers_held_whole"] < found["stats"]["layers_total"]
    say("`mlx-flash generate`", found["stats"], sum(map(len, expected.alone)))


def test_python(flash, expected):
    with mlx_flash.load(flash, MEMORY) as (model, tokenizer):
        for question, tokens in zip(QUESTIONS, expected.alone, strict=True):
            text = mlx_flash.generate(
                model, tokenizer, messages=message(question), max_tokens=MAX_TOKENS
            )
            assert model.flash.run.tokens == tokens, question
            assert text == tokenizer.decode(tokens, skip_special_tokens=True)
        stats = model.flash.report().to_dict()
    say("`mlx_flash.generate`", stats, sum(map(len, expected.alone)))


def test_a_conversation_in_python(flash, expected):
    """Every turn, and the earlier ones before it, which are not read again."""
    count = 0
    with mlx_flash.load(flash, MEMORY) as (model, tokenizer):
        talk = mlx_flash.Conversation(model, tokenizer, SYSTEM, max_tokens=MAX_TOKENS)
        for question, (tokens, text) in zip(QUESTIONS, expected.talk, strict=True):
            assert "".join(piece.text for piece in talk.ask(question)) == text
            assert model.flash.run.tokens == tokens, question
            assert (talk.cached_tokens > 0) == (count > 0)
            count += len(tokens)
        stats = model.flash.report().to_dict()
    say("`mlx_flash.Conversation`, three turns", stats, count)


def test_chat(flash, expected):
    """Three conversations, then one of three turns, as a person types them."""
    options = "--memory", MEMORY, "-m", MAX_TOKENS, "--system-prompt", SYSTEM
    apart = "".join(f"{question}\n/reset\n" for question in QUESTIONS)
    together = "".join(f"{question}\n" for question in QUESTIONS)
    for typed, answers in ((apart, expected.told), (together, expected.talk)):
        gc.collect()  # so that the figures have one model in memory
        result = command("chat", flash, *options, input=typed)
        assert result.stdout == "".join(f"{text}\n" for _, text in answers)
    print(f"\n`mlx-flash chat`:\n{result.stdout}{result.stderr}")
