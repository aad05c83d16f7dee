"""One connection: judge the request, then let mlx-lm's handler write the answer.

Whoever can open a page in a browser on this machine could otherwise ask the server
things in that page's name: so the Host must be this server's, and an Origin must be one
that `--allowed-origins` names.
"""

from __future__ import annotations

import io
import ipaddress
import json
import logging
import socket
import time
from typing import Any
from urllib.parse import urlsplit

from mlx_lm.server import APIHandler, CompletionRequest

from ..errors import FlashError
from .bodies import check_body
from .fields import Refused
from .worker import Worker

MAX_BODY_BYTES = 4_000_000  # a context of a million tokens is about that
REQUEST_S = 20.0  # for a client to send its whole request
SEND_S = 30.0  # for a client to take a part of the answer
LINGER_S = 2.0  # for which the rest of a refused request is read and dropped
COMPLETIONS = ("/v1/completions",)
CHATS = ("/v1/chat/completions", "/chat/completions")
MODELS = "/v1/models"


class _Timed(io.RawIOBase):
    """What a socket receives until a moment, however slowly it comes."""

    def __init__(self, connection: socket.socket, seconds: float):
        self.connection = connection
        self.end_time = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        left = self.end_time - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long")
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class Handler(APIHandler):
    """mlx-lm's handler behind our checks."""

    response_generator: Worker
    connection: socket.socket

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Timed(self.connection, REQUEST_S))

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        # Connections close after one answer; what is not read by then is lost.
        self.close_connection = True
        try:
            self._check_host()
            self._check_origin()
        except Refused as error:
            self._refuse(error)
            return False
        return True

    def do_GET(self) -> None:
        path, _, model = self.path.partition(MODELS)
        if self.path == "/health":
            well = self.response_generator.is_healthy
            status = "ok" if well else "unavailable"
            self._send(200 if well else 503, {"status": status})
        elif path or (model and not model.startswith("/")):
            self._refuse(_no_such_path(self.path))
        elif model.strip("/") and model[1:] not in self.response_generator.limits.names:
            self._refuse(Refused(f"There is no model {model[1:]!r} here.", 404))
        else:
            entry = {
                "id": self.response_generator.limits.name,
                "object": "model",
                "created": self.created,
                "owned_by": "mlx-flash",
            }
            one = {"object": "list", "data": [entry]}
            self._send(200, entry if model.strip("/") else one)

    def do_POST(self) -> None:
        try:
            if self.path not in COMPLETIONS + CHATS:
                raise _no_such_path(self.path)
            chat = self.path in CHATS
            limits = self.response_generator.limits
            self.checked = check_body(self._read_body(), chat, limits)
            raw = json.dumps(self.checked).encode()
        except Refused as error:
            self._refuse(error)
            return
        except RecursionError:
            self._refuse(Refused("The body is nested too deeply."))
            return
        self.headers.replace_header("Content-Length", str(len(raw)))
        self.rfile = io.BufferedReader(io.BytesIO(raw))  # type: ignore[arg-type]
        self.connection.settimeout(SEND_S)
        super().do_POST()

    def handle_completion(
        self, request: CompletionRequest, stop_words: list[str]
    ) -> None:
        """Let mlx-lm's handler answer, and turn what fails into an answer."""
        try:
            options = self.checked.get("chat_template_kwargs")
            job = self.response_generator.prepare(
                request, stop_words, options, self._client_left
            )
            super().handle_completion(job, stop_words)
        except Refused as error:
            self._refuse(error)
        except (ConnectionError, TimeoutError) as error:
            logging.info("A client left: %s", error)
        except Exception as error:
            if not isinstance(error, FlashError):
                logging.exception("A request failed.")
            self._fail(error)

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        """http.server's own complaints, in OpenAI's shape."""
        self._refuse(Refused(message or explain or self.responses[code][0], code))

    def log_message(self, format: str, *args: Any) -> None:
        logging.info(format, *args)

    def _set_cors_headers(self) -> None:
        origin = self.headers.get("Origin") if hasattr(self, "headers") else None
        if origin is None or not self._is_allowed(origin):
            return
        self.send_header("Access-Control-Allow-Origin", origin)
        self.send_header("Vary", "Origin")
        self.send_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS")
        self.send_header("Access-Control-Allow-Headers", "Content-Type, Authorization")

    def _is_allowed(self, origin: str) -> bool:
        allowed = self.response_generator.cli_args.allowed_origins
        return "*" in allowed or origin in allowed

    def _check_origin(self) -> None:
        origin = self.headers.get("Origin")
        same = origin is not None and urlsplit(origin).netloc == self.headers["Host"]
        if origin is not None and not same and not self._is_allowed(origin):
            raise Refused(
                f"Pages of {origin!r} may not use this server. Start it with "
                f"--allowed-origins {origin} if they should.",
                403,
            )

    def _check_host(self) -> None:
        """Refuse names that point here without being ours (DNS rebinding)."""
        host = self.headers.get("Host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        bound = self.response_generator.cli_args.host.lower()
        here = {"localhost", bound, self.connection.getsockname()[0]}
        if name not in here and not _is_loopback(name):
            raise Refused(
                f"Host {host!r} is not this server. Use the address it was started "
                "with (--host), or localhost.",
                403,
            )

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is None:
            raise Refused("A request needs a Content-Length.", 411)
        if not (length.isascii() and length.isdigit()) or len(length) > 18:
            raise Refused(f"Content-Length is no number of bytes: {length[:40]!r}.")
        if int(length) > MAX_BODY_BYTES:
            raise Refused(
                f"The body has {int(length):,} bytes; at most {MAX_BODY_BYTES:,} are "
                "taken.",
                413,
            )
        try:
            raw = self.rfile.read(int(length))
        except TimeoutError:
            raise Refused(
                f"The request did not arrive within {REQUEST_S:g} s.", 408
            ) from None
        if len(raw) < int(length):
            raise Refused(f"The body ended after {len(raw)} of {length} bytes.")
        return raw

    def _client_left(self) -> bool:
        """Whether the other side closed the connection."""
        timeout = self.connection.gettimeout()
        self.connection.setblocking(False)
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(timeout)

    def _refuse(self, error: Refused) -> None:
        self._send(error.status, _error(str(error), error.status))
        self._drop_the_rest()

    def _fail(self, error: Exception) -> None:
        """Say that an answer that was begun cannot be finished."""
        message = str(error) or type(error).__name__
        if self.stream:
            self.wfile.write(f"data: {json.dumps(_error(message, 500))}\n\n".encode())
        else:
            self._headers_buffer: list[bytes] = []  # what mlx-lm's had prepared
            self._send(500, _error(message, 500))

    def _send(self, status: int, content: dict[str, Any]) -> None:
        raw = json.dumps(content).encode()
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
        self.wfile.flush()

    def _drop_the_rest(self) -> None:
        """Read what is still being sent, else its sender would not see the answer."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
            rest = _Timed(self.connection, LINGER_S)
            while rest.readinto(bytearray(65536)):
                pass
        except OSError:  # it left, or goes on sending
            pass


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _no_such_path(path: str) -> Refused:
    known = ", ".join((*COMPLETIONS, CHATS[0], MODELS, "/health"))
    return Refused(f"There is nothing at {path[:80]!r}; there is {known}.", 404)


def _error(message: str, status: int) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
