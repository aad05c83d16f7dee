"""Who may ask: hosts, pages, keys, and how large and how slow a request may be."""

import asyncio
import contextlib
import socket

import pytest
from serving import ask, complete, post_bytes, received, send_raw, served
from starlette.requests import ClientDisconnect

import mlx_flash
from mlx_flash.server import Settings, guards, open_server

PAGE = "http://page.example"
PREFLIGHT = (
    "OPTIONS {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{more}\r\n"
)


@contextlib.contextmanager
def server(**settings):
    demo = str(mlx_flash.DEMO_MODEL)
    with open_server(demo, "50%", Settings(port=0, **settings)) as made, served(made):
        yield made.port


def preflight(port, path="/v1/chat/completions", origin=PAGE):
    """(status, header lines) of a browser's question whether a page may ask."""
    more = f"Origin: {origin}\r\nAccess-Control-Request-Method: POST\r\n"
    data = received(send_raw(port, PREFLIGHT.format(path=path, more=more).encode()))
    head = data.partition(b"\r\n\r\n")[0].decode().lower().splitlines()
    return int(head[0].split()[1]), head[1:]


def test_a_browser_asks_before_it_asks():
    with server(allowed_origins=(PAGE,), api_key="k") as port:
        status, lines = preflight(port)  # which never brings a key
        assert status == 204
        assert f"access-control-allow-origin: {PAGE}" in lines
        [allowed] = [x for x in lines if x.startswith("access-control-allow-headers")]
        for name in ("content-type", "authorization", "x-api-key"):
            assert name in allowed
        status, lines = preflight(port, origin="http://other.example")
        assert status == 403
        assert not [line for line in lines if line.startswith("access-control")]
        headers = {"Origin": PAGE}
        assert ask(port, "/v1/models", headers=headers)[0] == 401
        headers["Authorization"] = "bearer k"
        assert ask(port, "/v1/models", headers=headers)[0] == 200


def test_every_page_may_be_allowed():
    with server(allowed_origins=("*",)) as port:
        status, _, headers = ask(port, "/v1/models", headers={"Origin": PAGE})
        assert status == 200 and headers["Access-Control-Allow-Origin"] == PAGE
        assert headers["Vary"].lower() == "origin"


def test_what_the_server_itself_serves_may_ask():
    with server() as port:
        own = {"Origin": f"http://localhost:{port}", "Host": f"localhost:{port}"}
        assert ask(port, "/v1/models", headers=own)[0] == 200
        other = own | {"Origin": "http://localhost:1"}
        assert ask(port, "/v1/models", headers=other)[0] == 403
        null = own | {"Origin": "null"}
        assert ask(port, "/v1/models", headers=null)[0] == 403


def test_a_body_in_chunks_is_counted():
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    with server() as port:
        connection = send_raw(port, head + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):  # it closes when it has had enough
            for _ in range(guards.MAX_BODY_BYTES // 0x10000 + 1):
                connection.sendall(chunk)
        assert b" 413 " in connection.recv(65536)
        connection.close()
        assert complete(port, "Tom")


def test_a_connection_answers_several_requests():
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with server() as port:
        data = received(send_raw(port, one + one + last))
        assert data.count(b" 200 OK") == 3


def test_half_a_request_gets_an_answer():
    raw = post_bytes({"prompt": "Tom"})
    with server() as port:
        for cut in (10, len(raw) - 3):
            connection = send_raw(port, raw[:cut])
            connection.shutdown(socket.SHUT_WR)
            data = received(connection)
            assert b" 400 " in data and b'"message"' in data
        assert complete(port, "Tom")


@pytest.mark.parametrize("host", ["[", "evil@localhost.example"])
def test_hosts_that_are_no_names(host):
    with server() as port:
        assert ask(port, "/v1/models", headers={"Host": host})[0] in (400, 403)


def test_a_client_that_takes_nothing_is_let_go(monkeypatch):
    monkeypatch.setattr(guards, "SEND_S", 0.05)

    async def never(message):
        await asyncio.sleep(60)

    async def send():
        await guards._timed(never, None)({"type": "http.response.body"})

    with pytest.raises(ClientDisconnect):
        asyncio.run(send())
