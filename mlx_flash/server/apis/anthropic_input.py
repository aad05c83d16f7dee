"""What a body of Anthropic's Messages API asks for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..bodies import check_model, read_stop
from ..fields import Limits, Refused, flag, json_object, say, text, whole
from ..request import Request
from .conversation import Conversation
from .shared import (
    check_depth,
    function_tool,
    joined_text,
    not_text,
    objects,
    sampling,
)

SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k"}
ROLES = ("user", "assistant", "system")
THINKING = {
    "enabled": True,
    "adaptive": True,
    "between_tools": True,
    "disabled": False,
}


@dataclass(frozen=True)
class Asked:
    """A body that was checked.

    Attributes:
        model: As the request called it.
        thinking: Whether the answer tells what the model thinks: "shown", "omitted"
            (the block is there, without its text), or None.
        parallel: Whether it may call several tools at once.
    """

    model: str
    request: Request
    stream: bool
    thinking: str | None
    parallel: bool


def parse(body: dict[str, Any], limits: Limits, counting: bool = False) -> Asked:
    """Judge a body.

    Args:
        counting: Whether only its tokens are counted, and it needs no max_tokens.

    Raises:
        Refused: With one sentence on the first field that is wrong.
    """
    if "model" not in body:
        raise Refused("model is missing; GET /v1/models says what is here.")
    check_model(body, limits)
    most = None
    if not counting:
        most = whole("max_tokens", body.get("max_tokens"), 1, 2**31)
        most = min(most, limits.tokens)
    stop: tuple[str, ...] = ()
    if body.get("stop_sequences"):
        stop = read_stop(body["stop_sequences"])
    tools, parallel = _tools(body)
    options, shown = _thinking(body)
    request = Request(
        messages=_messages(body),
        tools=tools,
        max_tokens=most,
        stop=stop,
        template_options=options,
        sampling=sampling(body, limits, SAMPLING),
    )
    stream = flag("stream", body.get("stream", False))
    return Asked(body["model"], request, stream, shown, parallel)


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    made = Conversation()
    if "system" in body:
        made.add("system", joined_text("system", body["system"]))
    messages = objects("messages", body.get("messages"))
    if not messages:
        raise Refused("messages must have at least one message.")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role")
        if role not in ROLES:
            raise Refused(
                f"{where}.role must be one of {', '.join(ROLES)}, found {say(role)}."
            )
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        blocks = objects(f"{where}.content", content)
        if role == "assistant":
            _add_answer(made, where, blocks)
        else:
            _add_question(made, where, role, blocks)
    if messages[-1]["role"] == "assistant":
        raise Refused(
            "The last message must not be the assistant's: this server begins "
            "answers, and does not go on with one."
        )
    return made.messages


def _add_answer(made: Conversation, where: str, blocks: list[dict[str, Any]]) -> None:
    """A message of the model: thoughts, text and calls of tools."""
    said = ""
    thought = ""
    calls = []
    for i, block in enumerate(blocks):
        here = f"{where}.content[{i}]"
        kind = block.get("type")
        if kind == "text":
            said += text(f"{here}.text", block.get("text"))
        elif kind == "thinking":
            thought += text(f"{here}.thinking", block.get("thinking"))
        elif kind == "tool_use":
            calls.append(
                (
                    text(f"{here}.id", block.get("id")),
                    text(f"{here}.name", block.get("name")),
                    json.dumps(json_object(f"{here}.input", block.get("input"))),
                )
            )
        elif kind != "redacted_thinking":
            raise not_text(here, kind)
    made.add("assistant", said, thought)
    for call in calls:
        made.call(*call)


def _add_question(
    made: Conversation, where: str, role: str, blocks: list[dict[str, Any]]
) -> None:
    """A message to the model; what tools answered becomes messages before it."""
    asked = []
    results = 0
    for i, block in enumerate(blocks):
        here = f"{where}.content[{i}]"
        kind = block.get("type")
        if kind == "text":
            asked.append(text(f"{here}.text", block.get("text")))
        elif kind == "tool_result" and role == "user":
            results += 1
            id = text(f"{here}.tool_use_id", block.get("tool_use_id"))
            content = block.get("content") or ""
            content = joined_text(f"{here}.content", content)
            if flag(f"{here}.is_error", block.get("is_error", False)):
                content = f"Error: {content}"
            made.result(id, content)
        else:
            raise not_text(here, kind)
    if asked or not results:
        made.add(role, "".join(asked))


def _tools(body: dict[str, Any]) -> tuple[list[dict[str, Any]] | None, bool]:
    """The tools that may be called, and whether several at once."""
    made = []
    for i, tool in enumerate(objects("tools", body.get("tools", []))):
        where = f"tools[{i}]"
        if tool.get("type") not in (None, "custom"):
            raise Refused(
                f"{where} must be of type 'custom', found {say(tool['type'])}: this "
                "server has no tools of its own."
            )
        schema = tool.get("input_schema")
        schema = json_object(f"{where}.input_schema", schema)
        made.append(
            function_tool(where, tool.get("name"), tool.get("description"), schema)
        )
    choice = json_object("tool_choice", body.get("tool_choice", {"type": "auto"}))
    if choice.get("type") not in ("auto", "none"):
        raise Refused(
            "tool_choice.type can be 'auto' or 'none', found "
            f"{say(choice.get('type'))}: nothing can make this model call a tool."
        )
    single = choice.get("disable_parallel_tool_use", False)
    single = flag("tool_choice.disable_parallel_tool_use", single)
    return (made or None) if choice["type"] == "auto" else None, not single


def _thinking(body: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Options for the template, and how the answer tells of thoughts.

    Without `thinking` the real service does not think; neither does a model here whose
    template has a switch.
    """
    asked = json_object("thinking", body.get("thinking", {"type": "disabled"}))
    kind = asked.get("type")
    if not isinstance(kind, str) or kind not in THINKING:
        raise Refused(
            f"thinking.type must be one of {', '.join(THINKING)}, found {say(kind)}."
        )
    options: dict[str, Any] = {"enable_thinking": THINKING[kind]}
    output = json_object("output_config", body.get("output_config", {}))
    check_depth("output_config", output)
    if output.get("format") is not None:
        raise Refused(
            "output_config.format is not possible here: nothing can hold this model "
            "to a schema."
        )
    if output.get("effort") is not None:
        effort = text("output_config.effort", output["effort"])
        options["reasoning_effort"] = effort
    if not THINKING[kind]:
        return options, None
    return options, "omitted" if asked.get("display") == "omitted" else "shown"
