"""What a request has to pass before any API sees it.

Whoever can open a page in a browser on this machine could otherwise ask the server
things in that page's name: so the Host must be this server's, and an Origin must be one
that `--allowed-origins` names.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .failures import refusal
from .fields import Refused
from .settings import Settings

MAX_BODY_BYTES = 4_000_000  # a context of a million tokens is about that
REQUEST_S = 20.0  # for the body of a request to arrive
SEND_S = 30.0  # for a client to take a part of the answer
# What needs no key: whether the server lives, and the page that asks for one.
OPEN_PATHS = ("/", "/health")
OPEN_FOLDER = "/page/"


class Guards:
    """ASGI middleware: Host, Origin, key, size and time of every request."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        try:
            self._check_host(headers, scope)
            self._check_origin(origin, headers)
            preflight = scope["method"] == "OPTIONS" and origin is not None
            if not preflight:
                self._check_key(headers, scope["path"])
            self._check_length(headers)
        except Refused as error:
            await refusal(error, scope["path"])(scope, receive, send)
            return
        app = Response(status_code=204) if preflight else self._app
        allowed = origin if origin and self._is_allowed(origin) else None
        try:
            await app(scope, _limited(receive), _timed(send, allowed))
        except (ClientDisconnect, RuntimeError) as error:
            # Starlette's RuntimeError says that an answer was begun already.
            if not isinstance(error.__cause__ or error, ClientDisconnect):
                raise
            logging.info("A client took nothing for %g s.", SEND_S)

    def _is_allowed(self, origin: str) -> bool:
        allowed = self._settings.allowed_origins
        return "*" in allowed or origin in allowed

    def _check_origin(self, origin: str | None, headers: Headers) -> None:
        same = origin is not None and urlsplit(origin).netloc == headers.get("host")
        if origin is not None and not same and not self._is_allowed(origin):
            raise Refused(
                f"Pages of {origin!r} may not use this server. Start it with "
                f"--allowed-origins {origin} if they should.",
                403,
            )

    def _check_host(self, headers: Headers, scope: Scope) -> None:
        """Refuse names that point here without being ours (DNS rebinding)."""
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        here = {"localhost", self._settings.host.lower(), (scope["server"] or "_")[0]}
        if name not in here and not _is_loopback(name):
            raise Refused(
                f"Host {host!r} is not this server. Use the address it was started "
                "with (--host), or localhost.",
                403,
            )

    def _check_key(self, headers: Headers, path: str) -> None:
        key = self._settings.api_key
        if key is None or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        bearer = bearer if scheme.lower() == "bearer" else ""
        for given in (bearer, headers.get("x-api-key", "")):
            if hmac.compare_digest(given.strip().encode(), key.encode()):
                return
        raise Refused(
            "This server asks for a key: send Authorization: Bearer KEY, or "
            "x-api-key: KEY.",
            401,
        )

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise Refused(f"Content-Length is no number of bytes: {length[:40]!r}.")
        if int(length) > MAX_BODY_BYTES:
            raise _too_large(int(length))


def _limited(receive: Receive) -> Receive:
    """`receive` for a body that is neither too long nor too slow."""
    end_time = time.monotonic() + REQUEST_S
    n_bytes, more = 0, True

    async def limited() -> Message:
        nonlocal n_bytes, more
        if not more:
            return await receive()
        try:
            async with asyncio.timeout(end_time - time.monotonic()):
                message = await receive()
        except TimeoutError:
            raise Refused(
                f"The request did not arrive within {REQUEST_S:g} s.", 408
            ) from None
        n_bytes += len(message.get("body", b""))
        more = message.get("more_body", False)
        if n_bytes > MAX_BODY_BYTES:
            raise _too_large(n_bytes)
        return message

    return limited


def _timed(send: Send, origin: str | None) -> Send:
    """`send` to a client that takes what it gets, with CORS headers for `origin`."""

    async def timed(message: Message) -> None:
        if origin is not None and message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
            headers["Access-Control-Allow-Headers"] = (
                "Content-Type, Authorization, X-Api-Key"
            )
            headers.add_vary_header("Origin")
        try:
            async with asyncio.timeout(SEND_S):
                await send(message)
        except TimeoutError:
            raise ClientDisconnect from None

    return timed


def _too_large(n_bytes: int) -> Refused:
    return Refused(
        f"The body has {n_bytes:,} bytes; at most {MAX_BODY_BYTES:,} are taken.", 413
    )


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
