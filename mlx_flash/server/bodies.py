"""The fields of OpenAI's bodies, judged before anything else sees them.

A wrong type or a token id that does not exist would end mlx-lm's generation, or the
process. What is asked and cannot be had is refused, not passed over.
"""

from __future__ import annotations

import inspect
from typing import Any

from . import fields
from .fields import Limits, Refused
from .request import Request, Sampling

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MOST_ALTERNATIVES = 11  # of a token; mlx-lm's number
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
LOADING = ("adapters", "draft_model")  # what would make mlx-lm load something
# What OpenAI's server can do and this one cannot, with what may be said all the same.
FIXED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "modalities": (["text"],),
}


def read_request(body: dict[str, Any], chat: bool, limits: Limits) -> Request:
    """What a body of OpenAI's chat or completions API asks.

    Args:
        body: Its JSON object, without the fields that are null.
        chat: Whether it asks for a chat completion, with messages and not a prompt.
        limits: Of the loaded model.

    Raises:
        Refused: With one sentence on the first field that is wrong.
    """
    check_model(body, limits)
    for name, possible in FIXED.items():
        if name in body and body[name] not in possible:
            raise Refused(
                f"{name} cannot be {fields.say(body[name])} here, only "
                f"{' or '.join(fields.say(value) for value in possible)}."
            )
    common: dict[str, Any] = {
        "max_tokens": _max_tokens(body, limits),
        "stop": read_stop(body.get("stop", [])),
        "top_logprobs": _top_logprobs(body, chat, limits),
        "sampling": read_sampling(body, limits),
    }
    if chat:
        return Request(**_chat(body), **common)
    return Request(prompt=_prompt(body, limits), **common)


def check_model(body: dict[str, Any], limits: Limits) -> None:
    """Raise unless a body names the loaded model, or none."""
    for name in LOADING:
        if name in body:
            raise Refused(f"{name} cannot be chosen in a request: leave it out.")
    model = body.get("model", "default_model")
    if not isinstance(model, str) or model not in limits.names:
        raise Refused(
            f"There is no model {fields.say(model)} here; GET /v1/models says what is.",
            404,
        )


def read_sampling(body: dict[str, Any], limits: Limits) -> Sampling:
    """How a body wants tokens to be chosen, by the names of mlx-lm's server."""
    found: dict[str, Any] = {}
    for name, (low, high) in NUMBERS.items():
        if name in body:
            found[name] = fields.number(name, body[name], low, high)
    if found.get("temperature", 1) < LEAST_TEMPERATURE:
        found["temperature"] = 0.0
    contexts = (f"{x}_context_size" for x in ("repetition", "presence", "frequency"))
    wholes = [("top_k", limits.vocabulary - 1), ("seed", 2**63)]
    for name, high in [*wholes, *((name, 2**31) for name in contexts)]:
        if name in body:
            found[name] = fields.whole(name, body[name], 0, high)
    if "logit_bias" in body:
        found["logit_bias"] = _logit_bias(body["logit_bias"], limits)
    return Sampling(**found)


def read_stop(stop: Any) -> tuple[str, ...]:
    """The texts that end an answer, from one or several."""
    stops = stop if isinstance(stop, list) else [stop]
    if len(stops) > MAX_STOPS:
        raise Refused(f"stop has {len(stops)} texts; {MAX_STOPS} are possible.")
    for text in stops:
        if not 0 < len(fields.text("stop", text)) <= MAX_STOP_CHARACTERS:
            raise Refused(f"A stop text must have 1 to {MAX_STOP_CHARACTERS} letters.")
    return tuple(stops)


def _max_tokens(body: dict[str, Any], limits: Limits) -> int | None:
    found = None
    for name in ("max_tokens", "max_completion_tokens"):
        if name in body:
            found = fields.whole(name, body[name], 1, limits.tokens)
    return found


def _top_logprobs(body: dict[str, Any], chat: bool, limits: Limits) -> int | None:
    """How many alternatives are told with each token; None for no log probabilities."""
    most = min(MOST_ALTERNATIVES, limits.vocabulary - 1)
    wanted = body.get("logprobs", False)
    top = fields.whole("top_logprobs", body.get("top_logprobs", -1), -1, most)
    if not chat and type(wanted) is int:  # as OpenAI's completions have it
        return fields.whole("logprobs", wanted, 0, most)
    return max(top, 0) if fields.flag("logprobs", wanted) or top > 0 else None


def _chat(body: dict[str, Any]) -> dict[str, Any]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list with at least one message.")
    found: dict[str, Any] = {
        "messages": [_message(i, m) for i, m in enumerate(messages)]
    }
    tools = body.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise Refused(f"tools must be a list of objects, found {fields.say(tools)}.")
    if body.get("tool_choice") != "none":
        found["tools"] = tools or None
    if "role_mapping" in body:
        mapping = fields.json_object("role_mapping", body["role_mapping"])
        found["role_mapping"] = {k: fields.text(k, v) for k, v in mapping.items()}
    options = fields.json_object(
        "chat_template_kwargs", body.get("chat_template_kwargs", {})
    )
    if "reasoning_effort" in body:  # some templates know it
        effort = fields.text("reasoning_effort", body["reasoning_effort"])
        options = {"reasoning_effort": effort} | options
    found["template_options"] = _template_options(options)
    return found


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


def _logit_bias(bias: Any, limits: Limits) -> dict[int, float]:
    checked = {}
    for key, value in fields.json_object("logit_bias", bias).items():
        token = int(key) if key.isascii() and key.isdigit() and len(key) < 20 else -1
        fields.whole(
            f"logit_bias of token {fields.say(key)}", token, 0, limits.vocabulary - 1
        )
        checked[token] = fields.number("logit_bias", value, -100, 100)
    return checked
