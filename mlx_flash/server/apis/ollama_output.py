"""Answers in the shapes of Ollama's API: lines of JSON, or one object."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from ...errors import FlashError
from ..events import Done, Event, Progress, Reasoning, Text, Token, ToolCall
from ..facts import Facts
from ..failures import ollama_body
from ..fields import Limits
from .ollama_input import LATEST

FOREVER = "9999-12-31T23:59:59Z"  # the model stays until the server ends


class Answer:
    """Writes the events of an answer to /api/chat or /api/generate.

    Args:
        chat: Whether text is that of a message, or a response.
    """

    def __init__(self, model: str, chat: bool):
        self._model = model
        self._chat = chat
        self._calls = 0
        self._start_ns = time.monotonic_ns()
        self._first_ns: int | None = None  # when the answer began

    def lines(self, event: Event) -> Iterator[str]:
        """What a stream sends for an event."""
        for data in self.take(event):
            yield json.dumps(data) + "\n"

    def fail(self, error: FlashError) -> Iterator[str]:
        """What a stream sends when the answer fails."""
        yield json.dumps(ollama_body(str(error), 500)) + "\n"

    def whole(self, events: list[Event]) -> dict[str, Any]:
        """The one object for all events of an answer."""
        content = ""
        thinking = ""
        calls: list[dict[str, Any]] = []
        logprobs: list[dict[str, Any]] = []
        last: dict[str, Any] = {}
        for event in events:
            for last in self.take(event):
                part = last["message"] if self._chat else last
                content += part["content" if self._chat else "response"]
                thinking += part.get("thinking", "")
                calls += part.get("tool_calls", [])
                logprobs += last.get("logprobs", [])
        found = self._piece(content, thinking, calls)
        return last | found | ({"logprobs": logprobs} if logprobs else {})

    def loaded(self) -> dict[str, Any]:
        """The answer to a request without a prompt, which asks to load the model."""
        return self._head(True) | self._piece("") | {"done_reason": "load"}

    def take(self, event: Event) -> Iterator[dict[str, Any]]:
        """The objects for one event."""
        if isinstance(event, Progress):
            return
        if self._first_ns is None:
            self._first_ns = time.monotonic_ns()
        if isinstance(event, Done):
            yield self._head(True) | self._piece("") | self._end(event)
            return
        if isinstance(event, ToolCall):
            piece = self._piece("", calls=[self._call(event)])
        elif isinstance(event, Reasoning):
            piece = self._piece("", event.text)
        else:
            piece = self._piece(event.text)
        if isinstance(event, Text) and event.tokens:
            piece["logprobs"] = [_logprob(token) for token in event.tokens]
        yield self._head(False) | piece

    def _head(self, done: bool) -> dict[str, Any]:
        now = _stamp(time.time())
        return {"model": self._model, "created_at": now, "done": done}

    def _piece(
        self,
        content: str,
        thinking: str = "",
        calls: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        if thinking:
            extra["thinking"] = thinking
        if calls:
            extra["tool_calls"] = list(calls)
        if self._chat:
            return {"message": {"role": "assistant", "content": content, **extra}}
        return {"response": content, **extra}

    def _call(self, call: ToolCall) -> dict[str, Any]:
        function = {
            "index": self._calls,
            "name": call.name,
            "arguments": json.loads(call.arguments or "{}"),
        }
        self._calls += 1
        return {"id": call.id, "function": function}

    def _end(self, done: Done) -> dict[str, Any]:
        assert self._first_ns is not None
        now_ns = time.monotonic_ns()
        return {
            "done_reason": "length" if done.reason == "length" else "stop",
            "total_duration": now_ns - self._start_ns,
            "load_duration": 0,
            "prompt_eval_count": done.usage.prompt_tokens,
            "prompt_eval_duration": self._first_ns - self._start_ns,
            "eval_count": done.usage.completion_tokens,
            "eval_duration": now_ns - self._first_ns,
            "flash": done.usage.flash,
        }


def model_entry(limits: Limits, facts: Facts) -> dict[str, Any]:
    """The loaded model in a list of models."""
    name = limits.name if ":" in limits.name else limits.name + LATEST
    return {
        "name": name,
        "model": name,
        "modified_at": _stamp(facts.modified_s),
        "size": facts.model_bytes,
        "digest": facts.digest,
        "details": _details(facts),
    }


def running_entry(limits: Limits, facts: Facts) -> dict[str, Any]:
    """The loaded model in a list of what is in memory: the budget, not the files."""
    return model_entry(limits, facts) | {
        "size": facts.memory_bytes,
        "size_vram": facts.memory_bytes,
        "expires_at": FOREVER,
        "context_length": limits.tokens,
    }


def description(limits: Limits, facts: Facts) -> dict[str, Any]:
    """What /api/show says."""
    capabilities = ["completion"]
    capabilities += ["tools"] if facts.tools else []
    capabilities += ["thinking"] if facts.thinking else []
    return {
        "modelfile": "",
        "parameters": "",
        "license": "",
        "template": facts.chat_template or "",
        "details": _details(facts),
        "model_info": {
            "general.architecture": facts.family,
            f"{facts.family}.context_length": limits.tokens,
            f"{facts.family}.vocab_size": limits.vocabulary,
        },
        "capabilities": capabilities,
        "modified_at": _stamp(facts.modified_s),
    }


def _details(facts: Facts) -> dict[str, Any]:
    packing = facts.dtype if facts.bits is None else f"{facts.bits} bits"
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": facts.family,
        "families": [facts.family],
        "parameter_size": "",
        "quantization_level": packing,
    }


def _stamp(seconds: float) -> str:
    stamp = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")
    return stamp.replace("+00:00", "Z")


def _logprob(token: Token) -> dict[str, Any]:
    top = [{"token": text, "logprob": logprob} for _, text, logprob in token.top]
    return {"token": token.text, "logprob": token.logprob, "top_logprobs": top}
