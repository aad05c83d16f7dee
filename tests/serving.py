"""A server for tests: the command in a process of its own, and requests to it."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

STARTED_S = 120  # until a busy machine has a server ready


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve_command(folder, port, *options):
    command = [sys.executable, "-m", "mlx_flash.cli", "serve", "--model", str(folder)]
    return [*command, "--port", str(port), *options]


@contextmanager
def running(command, port, log, **environment):
    """The process, from when it answers; interrupted at the end."""
    with open(log, "w") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, env=os.environ | environment
        )
    try:
        end = time.monotonic() + STARTED_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > end:
                    raise AssertionError(open(log).read()) from None
                time.sleep(0.05)
        yield server
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        finally:
            server.kill()


@contextmanager
def served(listener):
    """A thread in which a server of this process answers."""
    ready = threading.Event()
    listener.ready = ready.set
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    try:
        assert ready.wait(STARTED_S)
        yield
    finally:
        listener.stop()
        thread.join()


def ask(port, path, body=None, headers=None, timeout=60):
    """(status, answer as JSON, headers); `body` is bytes or what JSON is made of."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        if body is None:
            connection.request("GET", path, headers=headers or {})
        else:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", path, raw, headers or {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), answer.headers
    finally:
        connection.close()


def complete(port, prompt, max_tokens=8, **options):
    """The text of a completion at temperature 0."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0} | options
    status, answer, _ = ask(port, "/v1/completions", body)
    assert status == 200, answer
    return answer["choices"][0]["text"]


def send_raw(port, data):
    """A socket that sent `data`."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(data)
    return connection


def post_bytes(body, path="/v1/completions"):
    """The bytes of a request."""
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw


def received(connection):
    """All that comes until the other side closes."""
    data = b""
    while piece := connection.recv(65536):
        data += piece
    connection.close()
    return data
