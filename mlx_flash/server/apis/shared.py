"""What the APIs share besides HTTP: sampling, tools, texts, tool calls."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Container, Mapping
from typing import Any

from ..bodies import LEAST_TEMPERATURE, NUMBERS
from ..events import Event, ToolCall
from ..fields import Limits, Refused, json_object, number, say, text, whole
from ..request import Sampling

MAX_DEPTH = 64  # of what clients may send: templates and encoders recurse
WHOLES = {
    "top_k": 2**31,
    "seed": 2**63,
    "repetition_context_size": 2**31,
}


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
