"""What the APIs share besides HTTP: errors in a shape, sampling, tools, tool calls."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ...errors import FlashError
from ..events import Event, ToolCall
from ..fields import Limits, Refused, json_object, number, say, text, whole
from ..request import Sampling

MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MAX_DEPTH = 64  # of what clients may send: templates and encoders recurse
LEAST_TEMPERATURE = 1e-3  # float16 overflows below: 0 instead, which is the limit
CLIENT_LEFT = 499  # as nginx logs it; nobody receives it
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
}
WHOLES = {
    "top_k": 2**31,
    "seed": 2**63,
    "repetition_context_size": 2**31,
}

Handler = Callable[[Request], Awaitable[Response]]
ErrorBody = Callable[[str, int], dict[str, Any]]


def endpoint(handler: Handler, error_body: ErrorBody) -> Handler:
    """A handler whose errors are answered in an API's own shape.

    Args:
        handler: May raise Refused and FlashError.
        error_body: What to send for a sentence and a status.
    """

    async def answer(http: Request) -> Response:
        try:
            return await handler(http)
        except Refused as error:
            return json_response(error_body(str(error), error.status), error.status)
        except FlashError as error:
            return json_response(error_body(str(error), 500), 500)
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        except Exception as error:
            logging.exception("A request failed.")
            sentence = f"This request failed: {type(error).__name__}."
            return json_response(error_body(sentence, 500), 500)

    return answer


def json_response(data: Any, status: int = 200) -> Response:
    """In ASCII, because what a client sent may be half of a character in UTF-16."""
    return Response(json.dumps(data), status, media_type="application/json")


def model_name(body: Mapping[str, Any], limits: Limits, where: str) -> str:
    """The name that a request gives the model; it has to be that of the loaded one.

    Args:
        where: Which request tells what there is, such as "GET /v1/models".
    """
    name = body.get("model", limits.name)
    if not isinstance(name, str) or name not in limits.names | {limits.name}:
        raise Refused(f"There is no model {say(name)} here; {where} says what is.", 404)
    return name


def sampling(
    body: Mapping[str, Any], limits: Limits, names: Mapping[str, str]
) -> Sampling:
    """How tokens are chosen.

    Args:
        body: Where the API has the fields.
        names: The fields it may have, with what `Sampling` calls them.
    """
    checked: dict[str, Any] = {}
    for name, own in names.items():
        if body.get(name) is None:
            continue
        if own in NUMBERS:
            checked[own] = number(name, body[name], *NUMBERS[own])
        else:
            checked[own] = whole(name, body[name], 0, WHOLES[own])
    if checked.get("temperature", 1) < LEAST_TEMPERATURE:
        checked["temperature"] = 0.0
    if "top_k" in checked:
        checked["top_k"] = min(checked["top_k"], limits.vocabulary - 1)
    return Sampling(**checked)


def stop_texts(name: str, value: Any) -> tuple[str, ...]:
    """The texts that end an answer, of one or a list of them."""
    stops = value if isinstance(value, list) else [value]
    if len(stops) > MAX_STOPS:
        raise Refused(f"{name} has {len(stops)} texts; {MAX_STOPS} are possible.")
    for stop in stops:
        if not 0 < len(text(name, stop)) <= MAX_STOP_CHARACTERS:
            raise Refused(
                f"A text in {name} must have 1 to {MAX_STOP_CHARACTERS} letters."
            )
    return tuple(stops)


def objects(name: str, value: Any) -> list[dict[str, Any]]:
    """A list of JSON objects, none of them nested deeper than is good."""
    if not isinstance(value, list):
        raise Refused(f"{name} must be a list of objects, found {say(value)}.")
    for i, entry in enumerate(value):
        json_object(f"{name}[{i}]", entry)
        check_depth(f"{name}[{i}]", entry)
    return value


def check_depth(name: str, value: Any) -> None:
    """Refuse what is nested deeper than templates and encoders can follow."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for x in level:
            if isinstance(x, dict):
                inner += x.values()
            elif isinstance(x, list):
                inner += x
        level = inner
        if not level:
            return
    raise Refused(f"{name} is nested more than {MAX_DEPTH} levels deep.")


def function_tool(
    where: str, name: Any, description: Any, parameters: Any
) -> dict[str, Any]:
    """A tool in OpenAI's shape, as chat templates take it."""
    function: dict[str, Any] = {"name": text(f"{where}.name", name)}
    if description is not None:
        function["description"] = text(f"{where}.description", description)
    if parameters is not None:
        function["parameters"] = json_object(f"{where}.parameters", parameters)
    return {"type": "function", "function": function}


def joined_text(where: str, content: Any, kinds: Container[Any] = ("text",)) -> str:
    """The text of a content that is one text or a list of parts.

    Args:
        where: It stands in the body.
        kinds: The types of parts that are text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused(f"{where} must be a text or a list, found {say(content)}.")
    pieces = []
    for i, part in enumerate(content):
        kind = json_object(f"{where}[{i}]", part).get("type")
        if kind not in kinds:
            raise not_text(f"{where}[{i}]", kind)
        pieces.append(text(f"{where}[{i}].text", part.get("text")))
    return "".join(pieces)


def not_text(where: str, kind: Any) -> Refused:
    return Refused(
        f"{where} cannot be of type {say(kind)}: this model reads and writes text "
        "alone, no images, sound or files."
    )


async def one_call(events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """The events of an answer without its tool calls after the first."""
    called = False
    async with contextlib.aclosing(events):  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, ToolCall):
                if called:
                    continue
                called = True
            yield event
