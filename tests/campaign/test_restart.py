"""A restarted server goes on from what the one before it had read.

    python -m pytest tests/campaign/test_restart.py -m "slow or not slow" -s

The figures that it prints are in docs/experiments.md.
"""

import json
import random
import sys
import time
from pathlib import Path

import pytest
from conftest import save_tokenizer
from serving import ask, free_port, running
from stock_checkpoints import QWEN3, write_checkpoint

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("serve_measured.py")
WIDE = {"hidden_size": 256, "num_hidden_layers": 4, "moe_intermediate_size": 384}
SIZES = [  # tokens, of the prefix; the model; context; memory
    pytest.param(600, {}, 1024, "2.9MB", id="600"),
    pytest.param(3000, WIDE, 4096, "38MB", id="3000", marks=pytest.mark.slow),
]


def served(folder, tmp_path, memory, context, saved, prompt):
    """(text, cached tokens, seconds, the server's figures) of one server's life."""
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, str(SCRIPT), str(port)]
    command += [str(folder), memory, str(context), str(saved)]
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0}
    with running(command, port, log, PYTHONPATH=str(ROOT)):
        begin = time.monotonic()
        status, answer, _ = ask(port, "/v1/completions", body, timeout=1500)
        seconds = time.monotonic() - begin
        assert status == 200, answer
        # It is written after the answer; the next one waits for that.
        ask(port, "/v1/completions", {"prompt": [5], "max_tokens": 1}, timeout=600)
    lines = log.read_text().splitlines()
    assert not any("Traceback" in line for line in lines), lines
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["text"], cached, seconds, json.loads(lines[0])


@pytest.mark.parametrize("length, changes, context, memory", SIZES)
def test_a_prefix_is_not_read_again(tmp_path, length, changes, context, memory):
    config = QWEN3 | {"max_position_embeddings": 8192} | changes
    folder = write_checkpoint(tmp_path / "experts", config)
    save_tokenizer(folder)
    saved, never = tmp_path / "saved", tmp_path / "never"
    prefix = random.Random(1).choices(range(3, 97), k=length)
    more = prefix + [5, 6, 7]
    args = folder, tmp_path, memory, context
    *_, before = served(*args, saved, prefix)
    expected, none, cold_s, cold = served(*args, never, more)
    text, cached, warm_s, warm = served(*args, saved, more)
    print(
        f"\n{length} tokens: {cold_s:.2f} s and {cold['bytes_read'] / 1e6:.1f} MB read"
    )
    print(f"again: {warm_s:.2f} s and {warm['bytes_read'] / 1e6:.1f} MB")
    [file] = saved.iterdir()
    print(f"the file has {file.stat().st_size / 1e6:.1f} MB")
    assert none == 0 and cached >= length
    assert text == expected
    assert 5 * warm["bytes_read"] <= cold["bytes_read"]
    for facts in (before, cold, warm):
        most = max(facts["peak_bytes"], facts["with_cache_bytes"])
        assert most <= facts["budget_bytes"]
