"""Judge the body of a request before anything else sees it.

mlx-lm's server trusts its clients: a wrong type or a token id that does not exist ends
its generation thread, or the process. What `check_body` returns has only fields that
mlx-lm knows, each of the type and in the range that it needs.
"""

from __future__ import annotations

import inspect
import json
from typing import Any

from . import fields
from .fields import Limits, Refused

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
LEAST_TEMPERATURE = 1e-3  # float16 overflows below: 0 instead, which is the limit
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 0.5),
}
FLAGS = ("stream", "logprobs")
LOADING = ("adapters", "draft_model")  # what would make mlx-lm load something


def check_body(raw: bytes, chat: bool, limits: Limits) -> dict[str, Any]:
    """The fields of a request, those that mlx-lm knows and no others.

    Args:
        raw: As it came.
        chat: Whether it asks for a chat completion, with messages and not a prompt.
        limits: Of the loaded model.

    Raises:
        Refused: With one sentence on the first field that is wrong.
    """
    body = {name: v for name, v in _parse(raw).items() if v is not None}
    _check_model(body, limits)
    checked: dict[str, Any] = {"model": body.get("model", "default_model")}
    for name, (low, high) in NUMBERS.items():
        if name in body:
            checked[name] = fields.number(name, body[name], low, high)
    if checked.get("temperature", 1) < LEAST_TEMPERATURE:
        checked["temperature"] = 0.0
    for name, low, high in _wholes(limits):
        if name in body:
            checked[name] = fields.whole(name, body[name], low, high)
    for name in FLAGS:
        if name in body:
            checked[name] = fields.flag(name, body[name])
    if "stream_options" in body:
        options = fields.json_object("stream_options", body["stream_options"])
        usage = options.get("include_usage", False)
        usage = fields.flag("stream_options.include_usage", usage)
        checked["stream_options"] = {"include_usage": usage}
    if "logit_bias" in body:
        checked["logit_bias"] = _logit_bias(body["logit_bias"], limits)
    if "stop" in body:
        checked["stop"] = _stop(body["stop"])
    return checked | (_chat(body) if chat else {"prompt": _prompt(body, limits)})


def _parse(raw: bytes) -> dict[str, Any]:
    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        body = json.loads(raw.decode(), parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"The body is not JSON in UTF-8: {error}.") from None
    return fields.json_object("The body", body)


def _check_model(body: dict[str, Any], limits: Limits) -> None:
    for name in LOADING:
        if name in body:
            raise Refused(f"{name} cannot be chosen in a request: leave it out.")
    model = body.get("model", "default_model")
    if not isinstance(model, str) or model not in limits.names:
        raise Refused(
            f"There is no model {fields.say(model)} here; GET /v1/models says what is.",
            404,
        )


def _wholes(limits: Limits) -> list[tuple[str, int, int]]:
    contexts = ("repetition", "presence", "frequency")
    return [
        ("max_tokens", 1, limits.tokens),
        ("max_completion_tokens", 1, limits.tokens),
        ("top_k", 0, limits.vocabulary - 1),
        ("top_logprobs", -1, min(11, limits.vocabulary - 1)),
        ("seed", 0, 2**63),
        *((f"{name}_context_size", 0, 2**31) for name in contexts),
    ]


def _chat(body: dict[str, Any]) -> dict[str, Any]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list with at least one message.")
    checked: dict[str, Any] = {
        "messages": [_message(i, m) for i, m in enumerate(messages)]
    }
    if "tools" in body:
        tools = body["tools"]
        if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
            raise Refused(
                f"tools must be a list of objects, found {fields.say(tools)}."
            )
        checked["tools"] = tools
    if "role_mapping" in body:
        mapping = fields.json_object("role_mapping", body["role_mapping"])
        checked["role_mapping"] = {k: fields.text(k, v) for k, v in mapping.items()}
    if "chat_template_kwargs" in body:
        options = fields.json_object(
            "chat_template_kwargs", body["chat_template_kwargs"]
        )
        checked["chat_template_kwargs"] = _template_options(options)
    return checked


def _message(i: int, message: Any) -> dict[str, Any]:
    """A message with its content as one text."""
    where = f"messages[{i}]"
    message = dict(fields.json_object(where, message))
    if message.get("role") not in ROLES:
        raise Refused(
            f"{where}.role must be one of {', '.join(ROLES)}, "
            f"found {fields.say(message.get('role'))}."
        )
    parts = message.get("content") or ""
    if not isinstance(parts, list):
        parts = [{"type": "text", "text": parts}]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise Refused(f"{where}.content must be text, found {fields.say(part)}.")
    message["content"] = "".join(
        fields.text(f"{where}.content", part.get("text")) for part in parts
    )
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(c, dict) for c in calls):
        raise Refused(f"{where}.tool_calls must be a list of objects.")
    return message


def _template_options(options: dict[str, Any]) -> dict[str, Any]:
    """Simple values for the template's own names, none for what applies it."""
    from transformers import PreTrainedTokenizerBase

    taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    for name, value in options.items():
        if name in taken or type(value) not in (bool, int, float, str):
            raise Refused(
                f"chat_template_kwargs.{name} cannot be {fields.say(value)} in a "
                "request."
            )
    return options


def _prompt(body: dict[str, Any], limits: Limits) -> str | list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and type(prompt[0]) is not int:
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt:
        return [fields.whole("A token id", t, 0, limits.vocabulary - 1) for t in prompt]
    if not isinstance(prompt, str) or not prompt.strip():
        raise Refused(
            "prompt must be one text, or the token ids of one, and not empty; "
            f"found {fields.say(prompt)}."
        )
    return prompt


def _logit_bias(bias: Any, limits: Limits) -> dict[str, float]:
    checked = {}
    for key, value in fields.json_object("logit_bias", bias).items():
        token = int(key) if key.isascii() and key.isdigit() and len(key) < 20 else -1
        fields.whole(
            f"logit_bias of token {fields.say(key)}", token, 0, limits.vocabulary - 1
        )
        checked[str(token)] = fields.number("logit_bias", value, -100, 100)
    return checked


def _stop(stop: Any) -> list[str]:
    stops = stop if isinstance(stop, list) else [stop]
    if len(stops) > MAX_STOPS:
        raise Refused(f"stop has {len(stops)} texts; {MAX_STOPS} are possible.")
    for text in stops:
        if not 0 < len(fields.text("stop", text)) <= MAX_STOP_CHARACTERS:
            raise Refused(f"A stop text must have 1 to {MAX_STOP_CHARACTERS} letters.")
    return stops
