"""A thousand requests of all kinds, eight at once: the server stays as it was.

    python -m pytest tests/campaign/test_requests.py -m slow -s

The kinds are drawn from a seed. The figures that it prints are in docs/reliability.md.
"""

import json
import random
import socket
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from serving import ask, complete, free_port, post_bytes, received, running, send_raw

ROOT = Path(__file__).parents[2]
REQUESTS, AT_ONCE, SEED = 1000, 8, 20
PROMPT = "Once upon a time, there was a"
PROMPTS = (
    PROMPT,
    "One day, Tom",
    "The dog was very",
    "Lily and her mom went to the park",
)
MALFORMED = (
    {"stop": 5},
    {"logit_bias": {"99999999999": 1}},
    {"temperature": float("nan")},
    {"max_tokens": 10**9},
    {"prompt": []},
    {"prompt": [5, 10**6]},
    {"prompt": "word " * 5000},
    {"model": "/etc"},
    {"adapters": "x"},
    {"seed": -1},
    {"top_k": 10**6},
    {"stream": 1},
)
JUNK = (b"", b"{", b"[1]", b"\xff\xfe\x00", b'{"prompt": ' + b"[" * 20_000)
# How a kind may end; 503 is an answer, too, but eight are never too many.
EXPECTED = {
    "well-formed": {200},
    "chat": {200},
    "stream": {200},
    "malformed": {400, 404},
    "junk": {400},
    "oversized": {413},
    "half a request": {400},
    "slow": {200},
    "vanished at once": {None},
    "vanished in the answer": {None},
    "idle": {None},
}
WEIGHTS = (25, 10, 10, 20, 10, 3, 5, 3, 6, 6, 2)


def body_of(rng):
    return {
        "prompt": rng.choice(PROMPTS) + rng.choice(("", " big", " happy", " red")),
        "max_tokens": rng.randint(1, 8),
        "temperature": rng.choice((0, 0.7)),
        "logprobs": rng.random() < 0.2,
        "presence_penalty": rng.choice((0, 0, 1)),
    }


def client(port, kind, seed):
    """The status of one request, None for a client that does not wait for it."""
    rng = random.Random(seed)
    body = body_of(rng)
    if kind == "well-formed":
        return ask(port, "/v1/completions", body)[0]
    if kind == "chat":
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        return ask(port, "/v1/chat/completions", body)[0]
    if kind == "malformed":
        return ask(port, "/v1/completions", body | rng.choice(MALFORMED))[0]
    if kind == "junk":
        return ask(port, "/v1/completions", rng.choice(JUNK))[0]
    if kind == "oversized":
        return ask(port, "/v1/completions", {"prompt": "x" * 5_000_000})[0]
    if kind == "idle":
        connection = send_raw(port, b"POST /v1/comp"[: rng.randint(0, 13)])
        time.sleep(rng.random())
        return connection.close()
    raw = post_bytes(body | {"stream": rng.random() < 0.5 or kind == "stream"})
    if kind == "half a request":
        connection = send_raw(port, raw[: -rng.randint(1, 20)])
        connection.shutdown(socket.SHUT_WR)
    elif kind == "slow":
        cut = rng.randint(1, len(raw) - 1)
        connection = send_raw(port, raw[:cut])
        time.sleep(rng.random())
        connection.sendall(raw[cut:])
    else:
        connection = send_raw(port, raw)
    if kind.startswith("vanished"):
        if kind.endswith("answer"):
            connection.recv(64)
        return connection.close()
    data = received(connection)
    if kind == "stream":
        assert b"data: [DONE]\n\n" in data and b'"error"' not in data
    return int(data.split()[1])


def measured(process):
    return {
        "MB": process.memory_info().rss / 1e6,
        "threads": process.num_threads(),
        "descriptors": process.num_fds(),
    }


@pytest.mark.slow
def test_a_thousand_requests_of_all_kinds(tmp_path):
    port, log = free_port(), tmp_path / "log"
    script = Path(__file__).with_name("serve_measured.py")
    rng = random.Random(SEED)
    kinds = rng.choices(list(EXPECTED), WEIGHTS, k=REQUESTS)
    ended, halves = Counter(), []
    command = [sys.executable, str(script), str(port)]
    with running(command, port, log, PYTHONPATH=str(ROOT)) as server:
        process = psutil.Process(server.pid)
        texts = [complete(port, prompt, 12) for prompt in PROMPTS]
        begin = time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as clients:
            for half in (range(REQUESTS // 2), range(REQUESTS // 2, REQUESTS)):
                ends = clients.map(lambda i: client(port, kinds[i], SEED + i), half)
                for i, status in zip(half, ends, strict=True):
                    assert status in EXPECTED[kinds[i]], (kinds[i], i, status)
                    ended[kinds[i], status] += 1
                time.sleep(5)  # until clients that left were noticed
                halves.append(measured(process))
        seconds = time.monotonic() - begin
        assert [complete(port, prompt, 12) for prompt in PROMPTS] == texts
    facts = json.loads(log.read_text().splitlines()[-1])
    print(f"\n{REQUESTS} requests, {AT_ONCE} at once, seed {SEED}, {seconds:.0f} s")
    for (kind, status), n in sorted(ended.items(), key=str):
        print(f"{kind}: {n} × {status or 'did not wait'}")
    print(*halves, facts, sep="\n")
    first, second = halves
    assert second["MB"] <= first["MB"] * 1.05
    assert second["threads"] <= first["threads"]
    assert second["descriptors"] <= first["descriptors"]
    assert facts["peak_bytes"] <= facts["budget_bytes"]
