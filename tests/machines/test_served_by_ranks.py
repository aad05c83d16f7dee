"""A server on rank 0 answers with the memory and the disk of all ranks."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import save_tokenizer
from machines.launched import free_port, python_path, start
from stock_checkpoints import QWEN3, write_checkpoint

PROMPTS = [f"w{i} w{i + 1} w{i + 7} " * (3 + i % 5) for i in range(3, 15)]


def ask(url: str, prompt: str, **more) -> bytes:
    body = {"prompt": prompt, "max_tokens": 10, "temperature": 0} | more
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        if more.get("stream"):
            return answer.read(200)  # and leave
        return json.load(answer)["choices"][0]["text"]


def answers(url: str) -> list[str]:
    end = time.monotonic() + 120
    while True:
        try:
            ask(url, "w5")
            break
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.2)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda prompt: ask(url, prompt), PROMPTS))
    ask(url, "w3 w4 w5", stream=True, max_tokens=300)
    return [*found, ask(url, "w9 w8 w7")]


@pytest.mark.slow
def test_ranks_serve_what_one_serves(tmp_path):
    model = write_checkpoint(tmp_path / "model", QWEN3 | {"num_experts": 16})
    save_tokenizer(model)
    words = ["-m", "mlx_flash", "serve", "--model", model, "--memory", "3MB"]
    found = []
    for ranks in (1, 2):
        port = free_port(1)
        command = [str(word) for word in (*words, "--port", port)]
        if ranks == 1:
            process = subprocess.Popen(
                [sys.executable, *command],
                env=os.environ | python_path(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        else:
            process = start(ranks, *command)
        try:
            found.append(answers(f"http://127.0.0.1:{port}"))
        finally:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.communicate(timeout=30)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    assert found[0] == found[1]
    assert len(set(found[0])) > 5
