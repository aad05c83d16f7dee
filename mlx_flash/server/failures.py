"""Errors as answers, in the shape of the API that was asked."""

from __future__ import annotations

import logging
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ..errors import FlashError
from .fields import Refused
from .http import json_response

LEFT = 499  # nobody sees it: nginx's number for clients that left
RETRY_S = 1


ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
}


def error_body(message: str, status: int) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def anthropic_body(message: str, status: int) -> dict[str, Any]:
    """Anthropic's shape of an error."""
    kind = ANTHROPIC.get(status) or ANTHROPIC[400 if status < 500 else 500]
    return {"type": "error", "error": {"type": kind, "message": message}}


def ollama_body(message: str, status: int) -> dict[str, Any]:
    """Ollama's shape of an error."""
    return {"error": message}


def body_at(path: str, message: str, status: int) -> dict[str, Any]:
    """The shape that clients of a path expect."""
    shape = error_body
    if path.startswith("/v1/messages"):
        shape = anthropic_body
    elif path.startswith("/api/"):
        shape = ollama_body
    return shape(message, status)


def refusal(error: FlashError, path: str = "") -> Response:
    """The answer to a request for `path` that fails with this."""
    status = error.status if isinstance(error, Refused) else 500
    headers = {}
    if status == 503:
        headers["Retry-After"] = str(RETRY_S)
    if status == 408:
        headers["Connection"] = "close"  # the rest of it may still come
    return json_response(body_at(path, str(error), status), status, headers)


async def _known(http: Request, error: Exception) -> Response:
    assert isinstance(error, FlashError)
    return refusal(error, http.url.path)


async def _of_starlette(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}."
    if error.status_code == 404:
        known = {getattr(route, "path", "") for route in http.app.routes}
        paths = sorted(path for path in known if path and "{" not in path)
        message = f"There is nothing at {http.url.path[:80]!r}; there is "
        message += f"{', '.join(paths)}."
    if error.status_code == 405:
        message = f"{http.method} does not go with {http.url.path[:80]!r}."
    body = body_at(http.url.path, message, error.status_code)
    return json_response(body, error.status_code, error.headers)


async def _left(http: Request, error: Exception) -> Response:
    logging.info("A client left: %s", http.url.path)
    return Response(status_code=LEFT)


async def _unknown(http: Request, error: Exception) -> Response:
    message = str(error) or type(error).__name__
    return json_response(body_at(http.url.path, message, 500), 500)


HANDLERS = {
    FlashError: _known,
    HTTPException: _of_starlette,
    ClientDisconnect: _left,
    Exception: _unknown,
}
