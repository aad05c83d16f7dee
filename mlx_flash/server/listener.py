"""uvicorn, on a socket that is bound before the model is loaded."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import FlashError
from .failures import error_body, refusal
from .fields import Refused
from .worker import Worker

MAX_CONNECTIONS = 64
REQUEST_S = 20.0  # for the head of a request, and for what follows a refused one
GRACE_S = 1.5  # for answers to end when the server does


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound, and that does not listen yet.

    Raises:
        FlashError: If that is not possible.
    """
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except BaseException:
            made.close()
            raise
        return made
    except (OSError, OverflowError) as error:
        raise _unusable(host, port, error) from error


class Listener(uvicorn.Server):
    """Answers requests at a bound socket while `run` runs.

    Attributes:
        worker: Who answers.
        url: Of the OpenAI API.
        port: Where it listens.
        ready: Called when it does.
    """

    def __init__(self, app: ASGIApp, bound: socket.socket, worker: Worker):
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                server_header=False,
                # uvicorn's type says int; asyncio takes any number.
                timeout_graceful_shutdown=GRACE_S,  # type: ignore[arg-type]
            )
        )
        self.worker = worker
        self._bound = bound
        host, self.port = bound.getsockname()[:2]
        self._host = host
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"
        self.ready = lambda: None
        self._interrupted = False

    def serve_forever(self) -> None:
        """Answer until Ctrl-C or `stop`.

        Raises:
            FlashError: If somebody else listens there by now.
            KeyboardInterrupt: After Ctrl-C, when all connections were closed.
        """
        self.run(sockets=[self._bound])
        if self._interrupted:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Have `serve_forever` return; any thread may call it."""
        self.worker.end_answers()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:
            raise _unusable(self._host, self.port, error) from error
        self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._interrupted = sig == signal.SIGINT
        self.worker.end_answers()
        super().handle_exit(sig, frame)


class Connection(H11Protocol):
    """uvicorn's, with an end to requests that never come, and errors as JSON."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self.app = refusal(
                Refused("Too many connections; try again in a moment.", 503)
            )
        self._begin_to_wait()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._begin_to_wait()
        super().on_response_complete()

    def eof_received(self) -> None:
        if self.cycle is None or self.cycle.more_body:
            self.send_400_response("The request ended before it was complete.")

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with the request, unless an answer was begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            raw = json.dumps(error_body(msg, 400)).encode()
            headers = {"content-type": "application/json", "connection": "close"}
            headers["content-length"] = str(len(raw))
            events: list[Any] = [
                h11.Response(status_code=400, headers=list(headers.items())),
                h11.Data(data=raw),
                h11.EndOfMessage(),
            ]
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _begin_to_wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(REQUEST_S, self._end_waiting)

    def _end_waiting(self) -> None:
        """Close, unless a request came: `guards` waits for the body of that."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def _unusable(host: str, port: int, error: Exception) -> FlashError:
    reason = getattr(error, "strerror", None) or error
    return FlashError(
        f"Nothing can listen at {host}, port {port}: {reason}. Choose another --port "
        "or --host."
    )
