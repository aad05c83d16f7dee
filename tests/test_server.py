"""`mlx-flash serve`: whatever a client sends, the next request is answered."""

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time

import mlx.core as mx
import pytest
from serving import (
    ask,
    complete,
    free_port,
    post_bytes,
    received,
    running,
    send_raw,
    serve_command,
    served,
)

import mlx_flash
from mlx_flash.server import Settings, guards, listener, open_server
from mlx_flash.server.conversations import LEAST_COMMON

PROMPT = "Once upon a time, there was a"
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'fail' %}{{ raise_exception('no') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n"
LIMIT = 256  # tokens of context that half of the demo model's memory leaves
DEEP = b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
MESSAGE = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo model with a chat template."""
    copy = tmp_path_factory.mktemp("served") / "demo"
    shutil.copytree(mlx_flash.DEMO_MODEL, copy)
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return copy


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    port = free_port()
    log = tmp_path_factory.mktemp("log") / "log"
    command = serve_command(folder, port, "--memory", "50%")
    nowhere = str(log.parent / "no-such-cache")
    with running(command, port, log, HF_HUB_OFFLINE="1", HF_HUB_CACHE=nowhere) as made:
        made.port = port
        made.log = log
        made.text = complete(port, PROMPT)
        yield made


@pytest.fixture
def port(server):
    """Of the server, which afterwards answers as it did before."""
    yield server.port
    assert complete(server.port, PROMPT) == server.text


@pytest.fixture
def own_server(folder, request):
    """A server in this process, which a test may alter."""
    settings = Settings(port=0, **getattr(request, "param", {}))
    gc.collect()  # of the server before, whose memory would count
    with open_server(str(folder), "50%", settings) as made, served(made):
        yield made


def check_refused(answer, status, says=""):
    code, body, _ = answer
    assert code == status, body
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"] and error["message"]


# ------------------------------------------------------------------ right requests


def test_a_completion_is_that_of_generate(server, folder, port):
    with mlx_flash.load(folder, "50%") as (model, tokenizer):
        expected = mlx_flash.generate(model, tokenizer, PROMPT, max_tokens=8)
    assert server.text == expected
    tokens = tokenizer.encode(PROMPT)
    assert complete(port, tokens) == complete(port, [PROMPT]) == expected


def test_a_stream_gives_the_same_text(server, port):
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    data = received(send_raw(port, post_bytes(body))).decode()
    events = [x[6:] for x in data.splitlines() if x.startswith("data: ")]
    assert events.pop() == "[DONE]"
    pieces = [json.loads(event) for event in events]
    assert pieces.pop()["usage"]["completion_tokens"] == 8
    assert "".join(p["choices"][0]["text"] for p in pieces) == server.text


def test_a_chat_knows_all_kinds_of_content(port):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    call = {"function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        MESSAGE,
    ]
    body = {"messages": messages, "max_tokens": 4, "temperature": 0, "seed": None}
    status, answer, _ = ask(port, "/v1/chat/completions", body)
    assert status == 200
    assert answer["choices"][0]["message"]["content"]
    body["messages"][1] = MESSAGE
    again = ask(port, "/v1/chat/completions", body)[1]
    assert again["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]


def test_every_option_at_once(port):
    body = {
        "prompt": PROMPT,
        "max_tokens": 6,
        "temperature": 1e-9,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "xtc_probability": 0,
        "logprobs": True,
        "top_logprobs": 3,
        "seed": 1,
        "logit_bias": {"0": -100, "2047": -1},
        "stop": ["zzz"],
        "user": "somebody",
    }
    status, answer, _ = ask(port, "/v1/completions", body)
    assert status == 200
    assert len(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 3


def test_a_stop_text_ends_the_answer(server, port):
    for word in (server.text.split()[2], server.text[5:9]):  # whole tokens, and not
        expected = server.text[: server.text.index(word)]
        assert complete(port, PROMPT, stop=["zzz", word]) == expected


def test_a_conversation_goes_on_with_its_kv_cache(own_server):
    port = own_server.port
    words = "Tom had a red ball and a blue kite. He liked to play with them in the park"
    first = complete(port, words)
    body = {"prompt": words + first, "max_tokens": 4, "temperature": 0}
    usage = ask(port, "/v1/completions", body)[1]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= LEAST_COMMON
    biased = body | {"logit_bias": {"5": -1}}
    usage = ask(port, "/v1/completions", biased)[1]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= LEAST_COMMON
    usage = ask(port, "/v1/completions", body | {"presence_penalty": 1})[1]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0


def test_models_are_listed_without_a_hub_cache(port, folder):
    status, answer, _ = ask(port, "/v1/models")
    assert status == 200
    assert [model["id"] for model in answer["data"]] == [str(folder)]
    assert ask(port, f"/v1/models/{folder}")[1]["id"] == str(folder)
    check_refused(ask(port, "/v1/models/other"), 404)
    assert ask(port, "/health")[1] == {"status": "ok"}


# ------------------------------------------------------------------ wrong requests


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b'"x"', b"null", b"\xff\xfe", DEEP, b"1" * 5000],
    ids=lambda body: repr(body[:12]),
)
def test_what_is_no_json_object_is_refused(port, path, body):
    check_refused(ask(port, path, body), 400)


@pytest.mark.parametrize(
    "field, value",
    [
        ("stop", 5),
        ("stop", [5]),
        ("stop", ""),
        ("stop", ["x"] * 17),
        ("stop", "x" * 1000),
        ("logit_bias", {"99999999999": 1}),
        ("logit_bias", {"2048": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": "x"}),
        ("logit_bias", {"1": float("nan")}),
        ("logit_bias", [1]),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("temperature", -1),
        ("temperature", True),
        ("top_p", 2),
        ("top_k", 2048),
        ("top_k", 1.5),
        ("xtc_threshold", 0.9),
        ("top_logprobs", 5000),
        ("logprobs", "yes"),
        ("repetition_penalty", -1),
        ("presence_penalty", [1]),
        ("seed", -1),
        ("seed", 2**70),
        ("max_tokens", 10**9),
        ("max_tokens", LIMIT + 1),
        ("max_tokens", 0),
        ("max_tokens", "8"),
        ("max_completion_tokens", 1.5),
        ("stream", "true"),
        ("stream_options", True),
        ("stream_options", {"include_usage": 1}),
        ("adapters", "somewhere"),
        ("draft_model", "default_model"),
        ("model", 5),
        ("prompt", ""),
        ("prompt", "  "),
        ("prompt", None),
        ("prompt", 5),
        ("prompt", []),
        ("prompt", ["a", "b"]),
        ("prompt", [5, 2048]),
        ("prompt", [5, -1]),
        ("prompt", [5, "x"]),
        ("prompt", "\ud800"),
        ("prompt", "word " * LIMIT),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_wrong_fields_of_a_completion_are_refused(port, field, value):
    body = {"prompt": PROMPT, "max_tokens": 2, field: value}
    status = 404 if field == "model" else 400
    says = "" if field == "prompt" else "stop" if field == "stop" else field
    if status == 404 or "nan" in repr(value) or "inf" in repr(value):
        says = ""
    check_refused(ask(port, "/v1/completions", body), status, says)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": None},
        {"messages": "Hello"},
        {"messages": ["Hello"]},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": ["user"], "content": "x"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": ["x"]}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [MESSAGE | {"tool_calls": 5}]},
        {"messages": [MESSAGE | {"tool_calls": [{"function": {"arguments": "{"}}]}]},
        {"messages": [{"role": "user", "content": "fail"}]},
        {"messages": [MESSAGE | {"content": "\ud800"}]},
        {"messages": [MESSAGE] * LIMIT},
        {"tools": 5},
        {"tools": [5]},
        {"role_mapping": {"user": 5}},
        {"chat_template_kwargs": 5},
        {"chat_template_kwargs": {"chat_template": "x"}},
        {"chat_template_kwargs": {"messages": "x"}},
        {"chat_template_kwargs": {"x": [1]}},
    ],
    ids=lambda fields: json.dumps(fields)[:50],
)
def test_wrong_fields_of_a_chat_are_refused(port, fields):
    body = {"messages": [MESSAGE], "max_tokens": 2} | fields
    check_refused(ask(port, "/v1/chat/completions", body), 400)


def test_addresses_are_never_fetched(port):
    with socket.create_server(("127.0.0.1", 0)) as trap:
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/picture.png"
        for kind in ("image_url", "input_image", "image"):
            part = {"type": kind, "image_url": {"url": url}}
            body = {"messages": [{"role": "user", "content": [part]}]}
            check_refused(ask(port, "/v1/chat/completions", body), 400, "text")
        trap.settimeout(0)
        with pytest.raises(BlockingIOError):
            trap.accept()


def test_only_the_loaded_model_can_be_named(port, folder, tmp_path):
    for name in ("default_model", str(folder), folder.name):
        assert complete(port, PROMPT, model=name)
    for name in (str(tmp_path), "org/model", "", str(mlx_flash.DEMO_MODEL)):
        body = {"prompt": PROMPT, "model": name}
        check_refused(ask(port, "/v1/completions", body), 404, "no model")


def test_unknown_paths_are_named(port):
    check_refused(ask(port, "/nothing"), 404, "/v1/completions")
    check_refused(ask(port, "/v1/modelsx"), 404)
    check_refused(ask(port, "/v1/embeddings", {}), 404)


@pytest.mark.parametrize(
    "head, status",
    [
        ("", 400),  # no body, and so no JSON
        ("Content-Length: -5\r\n", 400),
        ("Content-Length: five\r\n", 400),
        ("Content-Length: 5000000\r\n", 413),
        ("Content-Length: 99999999999999999999\r\n", 413),
        ("Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", 400),
        ("Transfer-Encoding: gzip\r\n", 400),
    ],
)
def test_what_is_wrong_with_the_length(port, head, status):
    begin = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    request = f"{begin}{head}\r\n"
    data = received(send_raw(port, request.encode()))
    assert int(data.split()[1]) == status
    assert b'"message"' in data


def test_too_large_a_body_is_refused_and_its_sender_sees_why(port):
    body = {"prompt": "x" * guards.MAX_BODY_BYTES}
    check_refused(ask(port, "/v1/completions", body), 413)


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x00\r\n\r\n", b"GET\r\n\r\n", b"\r\n"])
def test_what_is_no_http_is_no_trouble(port, data):
    connection = send_raw(port, data)
    connection.shutdown(socket.SHUT_WR)
    received(connection)


# ------------------------------------------------------------------------ web pages


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "127.0.0.1.x"])
def test_other_hosts_are_refused(port, host):
    check_refused(ask(port, "/v1/models", headers={"Host": host}), 403, "Host")


def test_own_hosts_are_welcome(port):
    for host in ("localhost", "127.0.0.1:80", "LOCALHOST:9", "[::1]", "127.0.0.9"):
        assert ask(port, "/v1/models", headers={"Host": host})[0] == 200


def test_pages_are_refused_and_get_no_leave_to_read(port):
    for path, body in (("/v1/models", None), ("/v1/completions", {"prompt": PROMPT})):
        answer = ask(port, path, body, {"Origin": "https://evil.example"})
        check_refused(answer, 403, "--allowed-origins")
        assert not [name for name in answer[2] if name.startswith("Access-Control")]
    assert "Access-Control-Allow-Origin" not in ask(port, "/v1/models")[2]


ORIGINS = {"allowed_origins": ("http://one.example", "http://two.example")}


@pytest.mark.parametrize("own_server", [ORIGINS], indirect=True)
def test_a_page_that_is_named_may_read(own_server):
    port = own_server.port
    status, _, headers = ask(
        port, "/v1/models", headers={"Origin": "http://two.example"}
    )
    assert status == 200
    assert headers["Access-Control-Allow-Origin"] == "http://two.example"
    check_refused(ask(port, "/v1/models", headers={"Origin": "http://x.y"}), 403)


# ---------------------------------------------------------------- slow, many, leaving


def test_slow_clients_time_out(own_server, monkeypatch):
    monkeypatch.setattr(guards, "REQUEST_S", 0.3)
    monkeypatch.setattr(listener, "REQUEST_S", 0.3)
    port = own_server.port
    connection = send_raw(port, post_bytes({"prompt": PROMPT})[:-5])
    assert b" 408 " in received(connection)
    connection = send_raw(port, b"POST /v1/compl")
    assert received(connection) == b""
    assert complete(port, PROMPT)


def test_a_client_that_trickles_has_no_more_time(own_server, monkeypatch):
    monkeypatch.setattr(listener, "REQUEST_S", 0.5)
    port = own_server.port
    connection = send_raw(port, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
    with pytest.raises(OSError):
        for _ in range(1000):
            connection.sendall(b"X")
            time.sleep(0.05)
    connection.close()


def test_connections_are_bounded(folder, monkeypatch):
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", 3)
    with open_server(str(folder), "50%", Settings(port=0)) as made, served(made):
        port = made.port
        idle = [send_raw(port, b"GET /v1") for _ in range(3)]
        data = received(send_raw(port, GET.replace(b"keep-alive", b"close")))
        assert b" 503 " in data and b'"message"' in data
        assert b"retry-after: 1" in data.lower()
        for connection in idle:
            connection.shutdown(socket.SHUT_WR)
            received(connection)
        assert complete(port, PROMPT)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_ends_its_answer(own_server, stream):
    """Noted by the tokens that were generated: far fewer than it asked for."""
    port, run = own_server.port, own_server.worker.model.flash
    body = {"prompt": PROMPT, "max_tokens": 240, "stream": stream}
    body["logit_bias"] = {"2": -100}  # no end of text
    text = complete(port, PROMPT)
    pause = threading.Event()
    slots = run.layers[0].slots
    original = slots.run

    def slow(*args, **options):
        pause.wait(0.05)
        return original(*args, **options)

    slots.run = slow
    connection = send_raw(port, post_bytes(body))
    while not (run.run and run.run.tokens):
        time.sleep(0.01)
    connection.close()
    assert complete(port, PROMPT) == text
    slots.run = original


def test_a_client_that_left_while_it_waited_gets_no_tokens(own_server):
    port, flash = own_server.port, own_server.worker.model.flash
    with flash._fence.lock:  # a step that takes long
        first = send_raw(port, post_bytes({"prompt": PROMPT, "max_tokens": 2}))
        second = send_raw(port, post_bytes({"prompt": "Two", "max_tokens": 99}))
        while own_server.worker.waiting < 2:
            time.sleep(0.01)
        second.close()
        time.sleep(3 * 0.2)
    received(first)
    assert complete(port, PROMPT)
    assert mx.get_peak_memory() <= flash.budget.total_bytes


# ----------------------------------------------------------------------- what fails


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_read_that_fails_fails_one_request(own_server, monkeypatch, stream):
    port, reader = own_server.port, own_server.worker.model.flash._reader
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "stream": stream}
    text = complete(port, PROMPT)
    original = reader.wait

    def wait(ticket):
        original(ticket)
        raise mlx_flash.FlashError("read of layer_03.safetensors failed: EIO")

    with monkeypatch.context() as patch:
        patch.setattr(reader, "wait", wait)
        for _ in range(2):
            data = received(send_raw(port, post_bytes(body)))
            assert int(data.split()[1]) == (200 if stream else 500)
            found, _ = json.JSONDecoder().raw_decode(
                data[data.index(b'{"error"') :].decode()
            )
            error = found["error"]
            assert error["message"].startswith("read of layer_03")
            assert error["type"] == "server_error"
    assert complete(port, PROMPT) == text


def test_an_error_of_our_own_fails_one_request(own_server, monkeypatch):
    port = own_server.port
    text = complete(port, PROMPT)
    slots = own_server.worker.model.flash.layers[0].slots
    with monkeypatch.context() as patch:
        patch.setattr(slots, "run", lambda *_: 1 / 0)
        answer = ask(port, "/v1/completions", {"prompt": PROMPT})
        check_refused(answer, 500, "division by zero")
    assert complete(port, PROMPT) == text


# ------------------------------------------------------------------ beginning and end


def run_serve(folder, *options, port=None, **environment):
    command = serve_command(folder, port or free_port(), *options)
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
    )


@pytest.mark.parametrize(
    "options, says",
    [
        (["--memory", "1MB"], "needs at least --memory"),
        (["--adapter-path", "no-such-adapter"], "no-such-adapter"),
        (["--draft-model", "no-such-draft"], "no-such-draft"),
        (["--pipeline"], "--pipeline"),
        (["--use-default-chat-template"], "--chat-template"),
        (["--decode-concurrency", "32"], "one after the other"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
    ],
)
def test_what_cannot_start_says_so_in_one_line(folder, options, says):
    done = run_serve(folder, *options)
    assert done.returncode == 1 and not done.stdout
    lines = done.stderr.strip().splitlines()
    assert says in lines[-1] and lines[-1].startswith("Error: ")
    assert len(lines) == 1


def test_a_missing_folder_is_named(tmp_path):
    done = run_serve(tmp_path / "missing")
    assert done.returncode == 1
    assert "missing" in done.stderr and "Traceback" not in done.stderr


def test_a_port_in_use_is_named_before_the_model_is_loaded(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_serve(folder, "--memory", "1MB", port=port)
    assert done.returncode == 1
    assert f"port {port}" in done.stderr and len(done.stderr.splitlines()) == 1


def test_nothing_listens_before_the_model_is_there(folder, monkeypatch):
    port = free_port()

    def load(*_, **__):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        raise mlx_flash.FlashError("no model")

    monkeypatch.setattr("mlx_flash.server.start.load", load)
    with pytest.raises(mlx_flash.FlashError, match="no model"):
        with open_server(str(folder), "50%", Settings(port=port)):
            pass


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "in a prompt"])
def test_ctrl_c_ends_it(folder, tmp_path, busy):
    port, log = free_port(), tmp_path / "log"
    command = serve_command(folder, port, "--memory", "70%", "--log-level", "WARNING")
    with running(command, port, log) as server:
        if busy:
            body = {"prompt": [5, 6] * 120, "max_tokens": 10, "stream": True}
            connection = send_raw(port, post_bytes(body))
            while b"keepalive" not in (data := connection.recv(4096)):
                assert data
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 130
        if busy:
            received(connection)
    lines = log.read_text().splitlines()
    assert len(lines) == 1
    for word in ("Serving", f"http://127.0.0.1:{port}/v1", str(folder), "MB", "cache."):
        assert word in lines[0]
