"""An answer in the shape of Anthropic's Messages API, whole and as a stream."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from ...errors import FlashError
from ..events import Done, Event, Progress, Reasoning, Text, ToolCall, Usage
from ..failures import anthropic_body
from ..http import sse
from .anthropic_input import Asked

UNSIGNED = "unsigned"  # real ones prove that thoughts came from the service


class Answer:
    """Builds the message of the events that happen.

    Attributes:
        message: As it is at the moment; complete after `Done`.
    """

    def __init__(self, asked: Asked):
        self.message: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": asked.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Usage(0, 0, 0)),
        }
        self._most = asked.request.max_tokens
        self._thinking = asked.thinking
        self._begun = False
        self._open = False  # whether the last block grows

    def lines(self, event: Event) -> Iterator[str]:
        """What a stream sends for an event."""
        for data in self.take(event):
            yield sse(data, data["type"])

    def fail(self, error: FlashError) -> Iterator[str]:
        """What a stream sends when the answer fails."""
        yield sse(anthropic_body(str(error), 500), "error")

    def take(self, event: Event) -> Iterator[dict[str, Any]]:
        """The API's events for one of ours.

        Send each before taking the next: they refer to what grows meanwhile.
        """
        if not self._begun:
            self._begun = True
            if isinstance(event, Progress):
                self.message["usage"]["input_tokens"] = event.total
            yield {"type": "message_start", "message": self.message}
        if isinstance(event, Progress):
            yield {"type": "ping"}
        elif isinstance(event, Reasoning):
            yield from self._think(event.text)
        elif isinstance(event, Text):
            if event.text:
                yield from self._grow({"type": "text", "text": ""})
                self.message["content"][-1]["text"] += event.text
                yield self._delta({"type": "text_delta", "text": event.text})
        elif isinstance(event, ToolCall):
            yield from self._call(event)
        elif isinstance(event, Done):
            yield from self._end(event)

    def _think(self, text: str) -> Iterator[dict[str, Any]]:
        if self._thinking is None or not text:
            yield {"type": "ping"}
            return
        block = {"type": "thinking", "thinking": "", "signature": ""}
        yield from self._grow(block)
        if self._thinking == "shown":
            self.message["content"][-1]["thinking"] += text
            yield self._delta({"type": "thinking_delta", "thinking": text})

    def _call(self, call: ToolCall) -> Iterator[dict[str, Any]]:
        yield from self._close()
        block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        yield from self._grow(block)
        self.message["content"][-1]["input"] = json.loads(call.arguments or "{}")
        delta = {"type": "input_json_delta", "partial_json": call.arguments}
        yield self._delta(delta)
        yield from self._close()

    def _grow(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Begin a block, unless one of its type grows already."""
        blocks = self.message["content"]
        if self._open and blocks[-1]["type"] == block["type"]:
            return
        yield from self._close()
        blocks.append(block)
        self._open = True
        index = len(blocks) - 1
        yield {"type": "content_block_start", "index": index, "content_block": block}

    def _close(self) -> Iterator[dict[str, Any]]:
        """End the block that grows, if one does."""
        if not self._open:
            return
        block = self.message["content"][-1]
        if block["type"] == "thinking":
            block["signature"] = UNSIGNED
            yield self._delta({"type": "signature_delta", "signature": UNSIGNED})
        self._open = False
        index = len(self.message["content"]) - 1
        yield {"type": "content_block_stop", "index": index}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        index = len(self.message["content"]) - 1
        return {"type": "content_block_delta", "index": index, "delta": delta}

    def _end(self, done: Done) -> Iterator[dict[str, Any]]:
        yield from self._close()
        end = {"stop_reason": self._reason(done), "stop_sequence": done.stop_text}
        self.message |= end
        usage = _usage(done.usage) | {"flash": done.usage.flash}
        self.message["usage"] = usage
        yield {"type": "message_delta", "delta": end, "usage": usage}
        yield {"type": "message_stop"}

    def _reason(self, done: Done) -> str:
        if done.reason == "tool_calls":
            return "tool_use"
        if done.reason == "stop":
            return "end_turn" if done.stop_text is None else "stop_sequence"
        if self._most is None or done.usage.completion_tokens < self._most:
            return "model_context_window_exceeded"
        return "max_tokens"


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts tokens of the prompt that were in a cache apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
