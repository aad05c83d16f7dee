"""Errors as answers, in OpenAI's shape."""

from __future__ import annotations

import logging
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ..errors import FlashError
from .fields import Refused

LEFT = 499  # nobody sees it: nginx's number for clients that left
RETRY_S = 1


def error_body(message: str, status: int) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def refusal(error: FlashError) -> Response:
    """The answer to a request that fails with this."""
    status = error.status if isinstance(error, Refused) else 500
    headers = {}
    if status == 503:
        headers["Retry-After"] = str(RETRY_S)
    if status == 408:
        headers["Connection"] = "close"  # the rest of it may still come
    return JSONResponse(error_body(str(error), status), status, headers)


async def _known(http: Request, error: Exception) -> Response:
    assert isinstance(error, FlashError)
    return refusal(error)


async def _of_starlette(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}."
    if error.status_code == 404:
        paths = sorted({getattr(r, "path", "") for r in http.app.routes} - {""})
        message = f"There is nothing at {http.url.path[:80]!r}; there is "
        message += f"{', '.join(paths)}."
    if error.status_code == 405:
        message = f"{http.method} does not go with {http.url.path[:80]!r}."
    body = error_body(message, error.status_code)
    return JSONResponse(body, error.status_code, error.headers)


async def _left(http: Request, error: Exception) -> Response:
    logging.info("A client left: %s", http.url.path)
    return Response(status_code=LEFT)


async def _unknown(http: Request, error: Exception) -> Response:
    return JSONResponse(error_body(str(error) or type(error).__name__, 500), 500)


HANDLERS = {
    FlashError: _known,
    HTTPException: _of_starlette,
    ClientDisconnect: _left,
    Exception: _unknown,
}
