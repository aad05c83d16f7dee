"""Several conversations at once, at a budget with room for two of them.

    python -m pytest tests/campaign/test_turns.py -m "slow or not slow" -s

The figures that it prints are in docs/reliability.md.
"""

import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import save_tokenizer
from serving import ask, free_port, running
from stock_checkpoints import QWEN3, write_checkpoint

import mlx_flash

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("serve_measured.py")
ANSWER = 6  # tokens
CONVERSATIONS = 4
SIZES = [  # tokens of a conversation, further turns, context, memory
    pytest.param(300, 4, 832, "1.8MB", id="300"),
    pytest.param(3000, 20, 6784, "7.8MB", id="3000", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Most of its memory is KV cache, and one layer's copy of it while it grows is not.
    config = QWEN3 | {
        "max_position_embeddings": 8192,
        "num_hidden_layers": 6,
        "hidden_size": 32,
        "moe_intermediate_size": 64,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    made = write_checkpoint(tmp_path_factory.mktemp("model") / "experts", config)
    save_tokenizer(made)
    return made


def prompts_of(length, turns):
    """Beginnings of all conversations, then further turns, whose it is drawn."""
    rng = random.Random(length)
    talks = [rng.choices(range(3, 97), k=length) for _ in range(CONVERSATIONS)]
    prompts = [list(talk) for talk in talks]
    for _ in range(turns):
        talk = rng.choice(talks)
        talk += rng.choices(range(3, 97), k=5)
        prompts.append(list(talk))
    return prompts


def answer(port, prompt):
    """The text of an answer, and how many tokens were not read again."""
    body = {"prompt": prompt, "max_tokens": ANSWER, "temperature": 0}
    status, found, _ = ask(port, "/v1/completions", body, timeout=1500)
    assert status == 200, found
    details = found["usage"]["prompt_tokens_details"]
    return found["choices"][0]["text"], details["cached_tokens"]


def one_at_a_time(folder, prompts):
    """Each by itself, with memory for everything."""
    with mlx_flash.load(folder, "1GB") as (model, tokenizer):
        return [
            mlx_flash.generate(model, tokenizer, prompt, max_tokens=ANSWER)
            for prompt in prompts
        ]


@pytest.mark.parametrize("length, turns, context, memory", SIZES)
def test_all_are_answered_as_if_alone(folder, tmp_path, length, turns, context, memory):
    port, log = free_port(), tmp_path / "log"
    prompts = prompts_of(length, turns)
    command = [sys.executable, str(SCRIPT), str(port)]
    command += [str(folder), memory, str(context)]
    begin = time.monotonic()
    with running(command, port, log, PYTHONPATH=str(ROOT)):
        with ThreadPoolExecutor(len(prompts)) as clients:
            found = list(clients.map(lambda prompt: answer(port, prompt), prompts))
        seconds = time.monotonic() - begin
        body = {"prompt": [5] * (context + 1), "max_tokens": 2}
        status, refused, _ = ask(port, "/v1/completions", body)
        assert status == 400 and "Shorten it" in refused["error"]["message"]
        assert answer(port, prompts[-1])[0] == found[-1][0]
    facts = json.loads(log.read_text().splitlines()[-1])
    again = sum(count > 0 for _, count in found)
    print(f"\n{len(prompts)} requests at once in {seconds:.0f} s, {again} of them went")
    print("on with a KV cache that was kept.", facts)
    assert facts["kept"] == 2 and facts["bytes_read"] > 0
    assert max(facts["peak_bytes"], facts["with_cache_bytes"]) <= facts["budget_bytes"]
    assert [text for text, _ in found] == one_at_a_time(folder, prompts)
