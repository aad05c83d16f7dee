"""What all APIs share of HTTP: JSON bodies in, whole or streamed answers out."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

from starlette import requests
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from ..errors import FlashError
from .events import Event
from .fields import Refused, json_object


async def read_json(http: requests.Request) -> dict[str, Any]:
    """The body's JSON object, without the fields that are null.

    Raises:
        Refused: If it is none.
    """

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        body = json.loads((await http.body()).decode(), parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"The body is not JSON in UTF-8: {error}.") from None
    found = json_object("The body", body)
    return {name: value for name, value in found.items() if value is not None}


def json_response(
    data: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """In ASCII, because what a client sent may be half of a character in UTF-16."""
    return Response(json.dumps(data), status, headers, "application/json")


async def collect(http: requests.Request, events: AsyncIterator[Event]) -> list[Event]:
    """All events of an answer that is sent whole; ends it when the client leaves.

    Raises:
        ClientDisconnect: If nobody waits for it any more.
    """
    gathered: list[Event] = []

    async def gather() -> None:
        async for event in events:
            gathered.append(event)

    async def wait_for_leaving() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    answer = asyncio.ensure_future(gather())
    leaving = asyncio.ensure_future(wait_for_leaving())
    try:
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect()
        answer.result()
        return gathered
    finally:
        answer.cancel()
        leaving.cancel()
        await asyncio.gather(answer, leaving, return_exceptions=True)


async def stream(
    events: AsyncIterator[Event],
    render: Callable[[Event], Iterable[str]],
    fail: Callable[[FlashError], Iterable[str]],
    media_type: str,
) -> StreamingResponse:
    """An answer that is sent while it is generated.

    Args:
        events: Of the answer. The first is awaited here, so that a request that cannot
            be answered still gets a status of its own.
        render: The lines to send for an event, each with its own end.
        fail: The lines to send when the answer fails after it was begun.
        media_type: Such as "text/event-stream".
    """
    first = await anext(events)

    async def lines() -> AsyncIterator[str]:
        async with contextlib.aclosing(events):  # type: ignore[type-var]
            try:
                for line in render(first):
                    yield line
                async for event in events:
                    for line in render(event):
                        yield line
            except FlashError as error:
                for line in fail(error):
                    yield line

    return StreamingResponse(lines(), media_type=media_type)


def sse(data: Any, event: str | None = None) -> str:
    """One server-sent event; `data` is a text or becomes JSON."""
    text = data if isinstance(data, str) else json.dumps(data)
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {text}\n\n"
