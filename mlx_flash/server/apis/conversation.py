"""A conversation as chat templates take it, made of what the APIs call its parts."""

from __future__ import annotations

import json
from typing import Any

from ..fields import Refused, json_object, text
from .shared import check_depth


class Conversation:
    """Gathers messages in OpenAI's shape.

    Templates know one system message, at the beginning: instructions that follow each
    other there become one. mlx-lm's templates take the arguments of tool calls as
    objects and the server makes them of the texts here.

    Attributes:
        messages: Those so far.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._called: dict[str, str] = {}  # names of tools by the ids of calls

    def add(self, role: str, content: str, reasoning: str = "") -> None:
        """A message; "developer" is what newer models call "system"."""
        role = "system" if role == "developer" else role
        last = self.messages[-1] if self.messages else None
        if role == "system" and len(self.messages) == 1 and last and is_system(last):
            last["content"] += "\n\n" + content
            return
        message = {"role": role, "content": content}
        if reasoning:
            message["reasoning_content"] = reasoning
        self.messages.append(message)

    def call(self, id: str, name: str, arguments: str, reasoning: str = "") -> None:
        """A tool that the model wanted to be called, in its message before this."""
        if not self.messages or self.messages[-1]["role"] != "assistant" or reasoning:
            self.add("assistant", "", reasoning)
        function = {"name": name, "arguments": arguments}
        calls = self.messages[-1].setdefault("tool_calls", [])
        calls.append({"id": id, "type": "function", "function": function})
        self._called[id] = name

    def result(self, id: str | None, content: str, name: str | None = None) -> None:
        """What a tool answered; without a name it has that of the call."""
        message = {"role": "tool", "content": content}
        if id is not None:
            message["tool_call_id"] = id
        name = name or self._called.get(id or "")
        if name:
            message["name"] = name
        self.messages.append(message)


def is_system(message: dict[str, Any]) -> bool:
    return message["role"] == "system"


def check_arguments(where: str, value: Any) -> str:
    """The arguments of a call, which have to be the text of a JSON object."""
    raw = text(where, value)
    try:
        found = json.loads(raw or "{}")
    except (ValueError, RecursionError):
        raise Refused(f"{where} must be the text of a JSON object.") from None
    check_depth(where, json_object(where, found))
    return raw or "{}"
