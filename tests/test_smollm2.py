"""A trained model from flash answers token for token as mlx-lm does in memory.

    python -m pytest tests/test_smollm2.py -m slow -s

MLX_FLASH_SMOLLM2 names a folder with SmolLM2-135M-Instruct as safetensors.
"""

import json
import os
from pathlib import Path

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


class Resident:
    """mlx-lm's own answers, with the model in memory."""

    def __init__(self):
        self.model, self.tokenizer = mlx_lm.load(SOURCE)

    def answer(self, messages):
        """Token ids, the last one of which ends the answer unless it was cut off."""
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True
        )
        steps = list(
            mlx_lm.stream_generate(
                self.model, self.tokenizer, prompt, max_tokens=MAX_TOKENS
            )
        )
        # The last response repeats the last token where the number of tokens ended it.
        return [s.token for s in steps][: steps[-1].generation_tokens]


@pytest.fixture(scope="module")
def resident():
    return Resident()


@pytest.fixture(scope="module")
def expected(resident):
    return [resident.answer(message(question)) for question in QUESTIONS]


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "smollm2-flash"
    return mlx_flash.convert(Path(SOURCE), folder, progress=False)


def command(*args, input=None):
    result = CliRunner().invoke(main, list(map(str, args)), input=input)
    assert result.exit_code == 0, result.output
    return result


def say(client, stats, tokens):
    print(
        f"\n| {client} | {len(QUESTIONS)} of {len(QUESTIONS)} | {tokens} | "
        f"{stats['peak_memory_bytes'] / 1e6:.0f} of "
        f"{stats['memory_budget_bytes'] / 1e6:.0f} MB | {stats['hit_rate']:.0%} | "
        f"{stats['tokens_per_s']:.1f} |"
    )


def test_generate(flash, expected):
    args = "--model", flash, "--memory", MEMORY, "-m", MAX_TOKENS, "--json"
    for question, tokens in zip(QUESTIONS, expected, strict=True):
        found = json.loads(command("generate", question, *args).stdout)
        assert found["tokens"] == tokens, question
        assert found["stats"]["layers_held_whole"] < found["stats"]["layers_total"]
    say("`mlx-flash generate`", found["stats"], sum(map(len, expected)))


def test_python(flash, expected):
    with mlx_flash.load(flash, MEMORY) as (model, tokenizer):
        for question, tokens in zip(QUESTIONS, expected, strict=True):
            text = mlx_flash.generate(
                model, tokenizer, messages=message(question), max_tokens=MAX_TOKENS
            )
            assert model.flash.run.tokens == tokens, question
            assert text and text in tokenizer.decode(tokens)
        stats = model.flash.report().to_dict()
    say("`mlx_flash.generate`", stats, sum(map(len, expected)))


def test_a_conversation_in_python(flash, resident):
    """Every turn, and the earlier ones before it, which are not read again."""
    count = 0
    with mlx_flash.load(flash, MEMORY) as (model, tokenizer):
        talk = mlx_flash.Conversation(model, tokenizer, SYSTEM, max_tokens=MAX_TOKENS)
        for i, question in enumerate(QUESTIONS):
            said = [{"role": "system", "content": SYSTEM}, *talk.messages]
            tokens = resident.answer([*said, *message(question)])
            for _ in talk.ask(question):
                pass
            assert model.flash.run.tokens == tokens, question
            assert (talk.cached_tokens > 0) == (i > 0)
            count += len(tokens)
        stats = model.flash.report().to_dict()
    say("`mlx_flash.Conversation`, three turns", stats, count)


def test_chat(flash, resident, expected):
    """Three conversations, then one of three turns, as a person types them."""
    options = "--memory", MEMORY, "-m", MAX_TOKENS, "--system-prompt", SYSTEM
    lines = "".join(f"{question}\n" for question in QUESTIONS)
    apart = "".join(f"{question}\n/reset\n" for question in QUESTIONS)
    for typed, forgets in ((apart, True), (lines, False)):
        shown = command("chat", flash, *options, "-q", input=typed).stdout
        said = [{"role": "system", "content": SYSTEM}]
        for question in QUESTIONS:
            asked = [*said[: 1 if forgets else None], *message(question)]
            tokens = resident.answer(asked)
            text = resident.tokenizer.decode(tokens, skip_special_tokens=True)
            assert shown.startswith(text + "\n"), question
            shown = shown.removeprefix(text + "\n")
            said = [*asked, {"role": "assistant", "content": text}]
        assert not shown
