"""A trained model from flash, asked through OpenAI's client, answers as mlx-lm does.

    python -m pytest tests/server/test_openai_smollm2.py -m slow -s

MLX_FLASH_SMOLLM2 names a folder with SmolLM2-135M-Instruct as safetensors.
"""

import os
from pathlib import Path

import mlx_lm
import openai
import pytest
from serving import served

import mlx_flash
from mlx_flash.server import Settings, open_server

SOURCE = os.environ.get("MLX_FLASH_SMOLLM2")
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue? Answer in one sentence.",
)
MAX_TOKENS = 24

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        SOURCE is None, reason="MLX_FLASH_SMOLLM2 names no folder of SmolLM2"
    ),
]


def message(question):
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def expected():
    """Token ids of mlx-lm's own answers, with the model in memory."""
    model, tokenizer = mlx_lm.load(SOURCE)
    answers = []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            message(question), add_generation_prompt=True
        )
        steps = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=MAX_TOKENS)
        answers.append([s.token for s in steps if s.finish_reason != "stop"])
    return answers


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "smol-flash"
    mlx_flash.convert(Path(SOURCE), folder)
    with open_server(str(folder), "60%", Settings(port=0)) as made, served(made):
        options = {"api_key": "none", "max_retries": 0, "timeout": 600}
        with openai.OpenAI(base_url=made.url, **options) as client:
            yield client


def told(choices):
    """Ids of the tokens whose log probabilities some choices tell."""
    logs = [choice.logprobs for choice in choices if choice.logprobs]
    return [entry.id for log in logs for entry in log.content]


def ask(client, question, **options):
    return client.chat.completions.create(
        model="default_model",
        messages=message(question),
        max_tokens=MAX_TOKENS,
        logprobs=True,
        **options,
    )


def test_three_answers_token_for_token(client, expected):
    for question, tokens in zip(QUESTIONS, expected, strict=True):
        answer = ask(client, question)
        print(f"\n{question} {answer.choices[0].message.content!r}")
        print(answer.usage.flash)
        assert told(answer.choices) == tokens, question


def test_a_stream_has_the_same_tokens(client, expected):
    chunks = ask(client, QUESTIONS[0], stream=True)
    assert told([chunk.choices[0] for chunk in chunks]) == expected[0]
