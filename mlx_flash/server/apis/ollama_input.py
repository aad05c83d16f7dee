"""What bodies of Ollama's API ask for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..bodies import read_stop
from ..facts import Facts
from ..fields import Limits, Refused, flag, json_object, number, say, text, whole
from ..request import Request, Sampling
from .conversation import Conversation
from .shared import function_tool, objects, sampling

ROLES = ("system", "user", "assistant", "tool")
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "repetition_context_size",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
# Ways to choose tokens that mlx-lm does not have, and when they do nothing.
ABSENT = {"mirostat": 0, "typical_p": 1, "tfs_z": 1}
EFFORTS = ("low", "medium", "high", "max")
MAX_TOP_LOGPROBS = 20
LATEST = ":latest"


@dataclass(frozen=True)
class Asked:
    """A body that was checked.

    Attributes:
        model: As the request called it.
        request: None if the model shall only be loaded.
    """

    model: str
    request: Request | None
    stream: bool


def own_name(body: Mapping[str, Any], limits: Limits) -> str:
    """The name that a request gives the model; ":latest" may follow it."""
    asked = body.get("model", body.get("name"))
    if asked is None:
        raise Refused("model is missing; GET /api/tags says what is here.")
    # ollama adds it to every name that has no other tag.
    plain = asked.removesuffix(LATEST) if isinstance(asked, str) else asked
    if not isinstance(plain, str) or plain not in limits.names:
        raise Refused(
            f"There is no model {say(asked)} here; GET /api/tags says what is.", 404
        )
    return asked


def parse_chat(body: dict[str, Any], limits: Limits, facts: Facts) -> Asked:
    """Judge a body of /api/chat.

    Raises:
        Refused: With one sentence on the first field that is wrong.
    """
    model, settings = _common(body, limits, facts)
    made = Conversation()
    for i, message in enumerate(objects("messages", body.get("messages", []))):
        _add(made, f"messages[{i}]", message)
    tools = []
    for i, tool in enumerate(objects("tools", body.get("tools", []))):
        function = json_object(f"tools[{i}].function", tool.get("function"))
        names = ("name", "description", "parameters")
        tools.append(function_tool(f"tools[{i}]", *map(function.get, names)))
    request = None
    if made.messages:
        request = Request(messages=made.messages, tools=tools or None, **settings)
    return Asked(model, request, flag("stream", body.get("stream", True)))


def parse_generate(body: dict[str, Any], limits: Limits, facts: Facts) -> Asked:
    """Judge a body of /api/generate.

    A model without a chat template gets the prompt as it is, as with Ollama.

    Raises:
        Refused: With one sentence on the first field that is wrong.
    """
    model, settings = _common(body, limits, facts)
    for name in ("suffix", "template", "context"):
        if body.get(name):
            raise Refused(f"{name} is not possible here: leave it out.")
    _check_images("images", body.get("images"))
    prompt = text("prompt", body.get("prompt", ""))
    system = text("system", body.get("system", ""))
    raw = flag("raw", body.get("raw", False))
    stream = flag("stream", body.get("stream", True))
    if not prompt:
        return Asked(model, None, stream)
    if raw:
        return Asked(model, Request(prompt=prompt, **settings), stream)
    if facts.chat_template is None:
        whole_prompt = f"{system}\n\n{prompt}" if system else prompt
        return Asked(model, Request(prompt=whole_prompt, **settings), stream)
    made = Conversation()
    if system:
        made.add("system", system)
    made.add("user", prompt)
    return Asked(model, Request(messages=made.messages, **settings), stream)


def _add(made: Conversation, where: str, message: dict[str, Any]) -> None:
    role = message.get("role")
    if role not in ROLES:
        raise Refused(
            f"{where}.role must be one of {', '.join(ROLES)}, found {say(role)}."
        )
    _check_images(f"{where}.images", message.get("images"))
    content = text(f"{where}.content", message.get("content") or "")
    if role == "tool":
        id = message.get("tool_call_id")
        if id is not None:
            id = text(f"{where}.tool_call_id", id)
        name = text(f"{where}.tool_name", message.get("tool_name") or "")
        made.result(id, content, name or None)
        return
    thinking = text(f"{where}.thinking", message.get("thinking") or "")
    made.add(role, content, thinking if role == "assistant" else "")
    calls = objects(f"{where}.tool_calls", message.get("tool_calls") or [])
    if calls and role != "assistant":
        raise Refused(f"{where}.tool_calls belong to messages of the assistant.")
    for i, call in enumerate(calls):
        here = f"{where}.tool_calls[{i}]"
        function = json_object(f"{here}.function", call.get("function"))
        name = text(f"{here}.function.name", function.get("name"))
        arguments = function.get("arguments", {})
        arguments = json_object(f"{here}.function.arguments", arguments)
        id = text(f"{here}.id", call.get("id") or f"call_{len(made.messages)}_{i}")
        made.call(id, name, json.dumps(arguments))


def _check_images(where: str, images: Any) -> None:
    if images:
        raise Refused(f"{where} must be empty: this model reads text alone.")


def _common(
    body: dict[str, Any], limits: Limits, facts: Facts
) -> tuple[str, dict[str, Any]]:
    """The model's name, and the fields of a `Request` that both endpoints have."""
    model = own_name(body, limits)
    if body.get("format"):
        raise Refused(
            "format is not possible here: nothing can hold this model to JSON or to a "
            "schema."
        )
    options = json_object("options", body.get("options", {}))
    most = min(MAX_TOP_LOGPROBS, limits.vocabulary - 1)
    top = whole("top_logprobs", body.get("top_logprobs", 0), 0, most)
    wanted = flag("logprobs", body.get("logprobs", False))
    return model, {
        "max_tokens": _most(options, limits),
        "stop": read_stop(options["stop"]) if options.get("stop") else (),
        "top_logprobs": top if wanted else None,
        "template_options": _thinking(body.get("think"), facts),
        "sampling": _sampling(options, limits),
    }


def _most(options: dict[str, Any], limits: Limits) -> int:
    """Tokens of the answer; negative numbers mean as many as there is room for."""
    most = options.get("num_predict")
    most = whole("num_predict", -1 if most is None else most, -2, 2**31)
    return limits.tokens if most <= 0 else min(most, limits.tokens)


def _sampling(options: dict[str, Any], limits: Limits) -> Sampling:
    for name, neutral in ABSENT.items():
        value = options.get(name)
        if value is not None and number(name, value, 0, 100) != neutral:
            raise Refused(f"{name} is not possible here: leave it out.")
    asked = dict(options)
    if asked.get("repeat_penalty") == 1:  # it does nothing, and the prompt is reread
        del asked["repeat_penalty"]
    for name in ("seed", "repeat_last_n"):
        # -1 stands for any seed, and for the whole context.
        if asked.get(name) == -1:
            asked[name] = None if name == "seed" else limits.tokens
    return sampling(asked, limits, SAMPLING)


def _thinking(think: Any, facts: Facts) -> dict[str, Any]:
    if think is None:
        return {}
    if isinstance(think, str) and think not in EFFORTS:
        raise Refused(f"think can be {', '.join(EFFORTS)}, found {say(think)}.")
    if not isinstance(think, str) and not flag("think", think):
        return {"enable_thinking": False}
    if not facts.thinking:
        raise Refused("This model does not support thinking: leave think out.")
    options: dict[str, Any] = {"enable_thinking": True}
    return options | ({"reasoning_effort": think} if isinstance(think, str) else {})
