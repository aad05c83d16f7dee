"""What a body of OpenAI's Responses API asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..bodies import check_model
from ..fields import Limits, Refused, flag, json_object, say, text, whole
from ..request import Request
from .conversation import Conversation, check_arguments
from .kept_responses import KeptResponses
from .shared import (
    function_tool,
    joined_text,
    not_text,
    objects,
    sampling,
)

ROLES = ("user", "assistant", "system", "developer")
TEXTS = ("input_text", "output_text", "text")
SAMPLING = {"temperature": "temperature", "top_p": "top_p"}
MAX_TOP_LOGPROBS = 20
LOGPROBS = "message.output_text.logprobs"
# Fields that would change the answer in ways that are not there.
ELSEWHERE = {
    "background": "send the request with stream instead",
    "conversation": "use previous_response_id",
    "prompt": "send instructions and input",
}


@dataclass(frozen=True)
class Asked:
    """A body that was checked.

    Attributes:
        model: As the request called it.
        echo: Fields that the answer repeats.
        items: The conversation with what was asked now, as `input` would have it.
    """

    model: str
    request: Request
    echo: dict[str, Any]
    items: list[Any]
    stream: bool
    store: bool
    parallel: bool


def parse(body: dict[str, Any], limits: Limits, kept: KeptResponses) -> Asked:
    """Judge a body.

    Raises:
        Refused: With one sentence on the first field that is wrong.
    """
    check_model(body, limits)
    model = body.get("model", limits.name)
    for name, instead in ELSEWHERE.items():
        if body.get(name):
            raise Refused(f"{name} is not possible here: {instead}.")
    if body.get("truncation", "disabled") != "disabled":
        raise Refused(
            f"truncation can only be disabled, found {say(body['truncation'])}."
        )
    most = None
    if "max_output_tokens" in body:
        most = whole("max_output_tokens", body["max_output_tokens"], 1, 2**31)
        most = min(most, limits.tokens)
    items = _items(body, kept)
    instructions = body.get("instructions")
    chosen, tools = _tools(body)
    request = Request(
        messages=_messages(instructions, items),
        tools=tools if chosen == "auto" else None,
        max_tokens=most,
        top_logprobs=_top_logprobs(body, limits),
        template_options=_thinking(body),
        sampling=sampling(body, limits, SAMPLING),
    )
    _check_format(body)
    parallel = flag("parallel_tool_calls", body.get("parallel_tool_calls", True))
    store = flag("store", body.get("store", True))
    echo = {
        "instructions": instructions,
        "max_output_tokens": body.get("max_output_tokens"),
        "metadata": _metadata(body),
        "parallel_tool_calls": parallel,
        "previous_response_id": body.get("previous_response_id"),
        "reasoning": {"effort": body.get("reasoning", {}).get("effort")},
        "store": store,
        "temperature": request.sampling.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": chosen,
        "tools": body.get("tools", []),
        "top_logprobs": request.top_logprobs or 0,
        "top_p": request.sampling.top_p,
        "truncation": "disabled",
    }
    stream = flag("stream", body.get("stream", False))
    return Asked(model, request, echo, items, stream, store, parallel)


def _items(body: dict[str, Any], kept: KeptResponses) -> list[Any]:
    """The whole conversation: that of the previous response and the new input."""
    asked = body.get("input")
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    if not isinstance(asked, list) or not asked:
        raise Refused(
            "input must be a text, or a list with at least one item; "
            f"found {say(asked)}."
        )
    previous = body.get("previous_response_id")
    if previous is None:
        return objects("input", asked)
    found = kept.find(text("previous_response_id", previous))
    if found is None:
        raise Refused(
            f"There is no response {say(previous)}: this server keeps the last ones "
            "in memory. Send the whole conversation as input."
        )
    return found.items + objects("input", asked)


def _messages(instructions: Any, items: list[Any]) -> list[dict[str, Any]]:
    made = Conversation()
    if instructions is not None:
        made.add("system", text("instructions", instructions))
    reasoning = ""
    for i, item in enumerate(items):
        where = f"input[{i}]"
        kind = item.get("type", "message")
        if kind == "message":
            role = item.get("role")
            if role not in ROLES:
                raise Refused(
                    f"{where}.role must be one of {', '.join(ROLES)}, found "
                    f"{say(role)}."
                )
            content = joined_text(f"{where}.content", item.get("content"), TEXTS)
            made.add(role, content, reasoning if role == "assistant" else "")
            reasoning = ""
        elif kind == "reasoning":
            content = item.get("content") or ""
            reasoning += joined_text(f"{where}.content", content, ["reasoning_text"])
        elif kind == "function_call":
            id = text(f"{where}.call_id", item.get("call_id"))
            name = text(f"{where}.name", item.get("name"))
            arguments = item.get("arguments", "")
            arguments = check_arguments(f"{where}.arguments", arguments)
            made.call(id, name, arguments, reasoning)
            reasoning = ""
        elif kind == "function_call_output":
            id = text(f"{where}.call_id", item.get("call_id"))
            output = joined_text(f"{where}.output", item.get("output"), TEXTS)
            made.result(id, output)
        elif kind == "item_reference":
            raise Refused(
                f"{where} refers to an item; send the item itself, or name the "
                "response with previous_response_id."
            )
        else:
            raise not_text(where, kind)
    if not made.messages:
        raise Refused("input must have at least one message.")
    return made.messages


def _tools(body: dict[str, Any]) -> tuple[str, list[dict[str, Any]] | None]:
    """What is chosen of the tools, "auto" or "none", and the tools."""
    made = []
    for i, tool in enumerate(objects("tools", body.get("tools", []))):
        where = f"tools[{i}]"
        if tool.get("type") != "function":
            raise Refused(
                f"{where} must be of type 'function', found {say(tool.get('type'))}: "
                "this server has no tools of its own."
            )
        made.append(
            function_tool(
                where,
                tool.get("name"),
                tool.get("description"),
                tool.get("parameters"),
            )
        )
    choice = body.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise Refused(
            f"tool_choice can be 'auto' or 'none', found {say(choice)}: nothing can "
            "make this model call a tool."
        )
    return choice, made or None


def _thinking(body: dict[str, Any]) -> dict[str, Any]:
    effort = json_object("reasoning", body.get("reasoning", {})).get("effort")
    if effort is None:
        return {}
    if text("reasoning.effort", effort) == "none":
        return {"enable_thinking": False}
    return {"enable_thinking": True, "reasoning_effort": effort}


def _top_logprobs(body: dict[str, Any], limits: Limits) -> int | None:
    include = body.get("include", [])
    if not isinstance(include, list):
        raise Refused(f"include must be a list, found {say(include)}.")
    wanted = LOGPROBS in include
    if "top_logprobs" in body:
        most = min(MAX_TOP_LOGPROBS, limits.vocabulary - 1)
        return whole("top_logprobs", body["top_logprobs"], 0, most)
    return 0 if wanted else None


def _check_format(body: dict[str, Any]) -> None:
    options = json_object("text", body.get("text", {}))
    form = json_object("text.format", options.get("format") or {"type": "text"})
    if form.get("type") != "text":
        raise Refused(
            f"text.format can only be of type 'text', found {say(form.get('type'))}: "
            "nothing can hold this model to a schema."
        )


def _metadata(body: dict[str, Any]) -> dict[str, str]:
    found = json_object("metadata", body.get("metadata", {}))
    return {name: text(f"metadata.{name}", value) for name, value in found.items()}
