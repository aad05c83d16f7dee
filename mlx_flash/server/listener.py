"""The listening socket, and a bounded number of connections."""

from __future__ import annotations

import ctypes
import logging
import socket
import sys
from http.server import ThreadingHTTPServer
from threading import BoundedSemaphore
from typing import Any

from mlx_lm.server import get_system_fingerprint

from ..errors import FlashError
from .handler import Handler
from .worker import Worker

MAX_CONNECTIONS = 64
M_ARENA_MAX, ARENAS = -8, 2  # of glibc's mallopt
BUSY = b"""HTTP/1.0 503 Service Unavailable\r
Content-Type: application/json\r
Retry-After: 1\r
\r
{"error": {"message": "Too many connections; try again in a moment.", \
"type": "server_error", "param": null, "code": null}}"""


class Listener(ThreadingHTTPServer):
    """Bound from the beginning, listening from `listen` on.

    Attributes:
        worker: Who answers, from `listen` on.
    """

    request_queue_size = MAX_CONNECTIONS  # clients that come at once; 5 by default

    def __init__(self, host: str, port: int):
        try:
            found = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            self.address_family, _, _, _, address = found[0]
            super().__init__(address[:2], Handler, bind_and_activate=False)  # type: ignore[arg-type]
            self.server_bind()
        except (OSError, OverflowError) as error:
            raise _unusable(host, port, error) from error
        self._free = BoundedSemaphore(MAX_CONNECTIONS)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        name = f"[{host!s}]" if ":" in str(host) else host
        return f"http://{name!s}:{port}/v1"

    def listen(self, worker: Worker) -> None:
        """Take connections; `serve_forever` answers them."""
        _limit_arenas()
        self.worker = worker
        self._fingerprint = get_system_fingerprint()
        try:
            self.server_activate()
        except OSError as error:
            host, port = worker.cli_args.host, self.server_address[1]
            raise _unusable(host, int(port), error) from error

    def finish_request(self, request: Any, client_address: Any) -> None:
        Handler(
            self.worker,
            request,
            client_address,
            self,
            system_fingerprint=self._fingerprint,
        )

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            request.settimeout(0)
            try:
                request.send(BUSY)
            except OSError:  # it left
                pass
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # else a client that left
            logging.exception("A connection failed.")


def _limit_arenas() -> None:
    """Have threads of connections share malloc's memory.

    glibc gives each of them an arena, up to eight a core, and each keeps what a long
    prompt needed once: 164 instead of 129 MB after a thousand requests.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(M_ARENA_MAX, ARENAS)


def _unusable(host: str, port: int, error: Exception) -> FlashError:
    reason = getattr(error, "strerror", None) or error
    return FlashError(
        f"Nothing can listen at {host}, port {port}: {reason}. Choose another --port "
        "or --host."
    )
