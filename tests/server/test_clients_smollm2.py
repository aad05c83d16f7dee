"""A trained model from flash, asked by three clients, answers as mlx-lm does.

    python -m pytest tests/server/test_clients_smollm2.py -m slow -s

MLX_FLASH_SMOLLM2 names a folder with SmolLM2-135M-Instruct as safetensors.
"""

import os
from pathlib import Path

import anthropic
import mlx_lm
import ollama
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
NAME = "default_model"

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
    """For each question the answer of mlx-lm with the model in memory.

    That is its text, the text of each token, and how many tokens were generated, the
    one that ends the answer included.
    """
    model, tokenizer = mlx_lm.load(SOURCE)
    answers = []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            message(question), add_generation_prompt=True
        )
        steps = list(
            mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=MAX_TOKENS)
        )
        count = steps[-1].generation_tokens
        said = [step.token for step in steps][:count]
        if steps[-1].finish_reason == "stop":
            said.pop()
        pieces = [tokenizer.decode([token]) for token in said]
        answers.append(("".join(step.text for step in steps), pieces, count))
    return answers


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "smol-flash"
    mlx_flash.convert(Path(SOURCE), folder)
    with open_server(str(folder), "60%", Settings(port=0)) as made, served(made):
        yield made


def root(server):
    return server.url.removesuffix("/v1")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_openai_responses(server, expected, stream):
    options = {"api_key": "none", "max_retries": 0, "timeout": 600}
    with openai.OpenAI(base_url=server.url, **options) as client:
        for question, (text, pieces, count) in zip(QUESTIONS, expected, strict=True):
            answer = client.responses.create(
                model=NAME,
                input=question,
                temperature=0,
                max_output_tokens=MAX_TOKENS,
                include=["message.output_text.logprobs"],
                stream=stream,
            )
            if stream:
                *_, last = answer
                answer = last.response
            assert answer.output_text == text
            told = answer.output[0].content[0].logprobs
            assert [entry.token for entry in told] == pieces
            assert answer.usage.output_tokens == count
            print(f"\n{question} {text!r} {answer.usage.model_extra}")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_anthropic(server, expected, stream):
    options = {"api_key": "none", "max_retries": 0, "timeout": 600}
    with anthropic.Anthropic(base_url=root(server), **options) as client:
        for question, (text, _, count) in zip(QUESTIONS, expected, strict=True):
            asked = {
                "model": NAME,
                "messages": message(question),
                "max_tokens": MAX_TOKENS,
                "extra_body": {"temperature": 0},
            }
            if stream:
                with client.messages.stream(**asked) as events:
                    assert "".join(events.text_stream) == text
                    answer = events.get_final_message()
            else:
                answer = client.messages.create(**asked)
            assert answer.content[0].text == text
            assert answer.usage.output_tokens == count


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_ollama(server, expected, stream):
    with ollama.Client(host=root(server), timeout=600, trust_env=False) as client:
        for question, (text, pieces, count) in zip(QUESTIONS, expected, strict=True):
            answer = client.chat(
                NAME,
                message(question),
                options={"temperature": 0, "num_predict": MAX_TOKENS},
                logprobs=True,
                stream=stream,
            )
            parts = list(answer) if stream else [answer]
            assert "".join(part.message.content for part in parts) == text
            told = [entry.token for part in parts for entry in part.logprobs or ()]
            assert told == pieces
            assert parts[-1].eval_count == count
