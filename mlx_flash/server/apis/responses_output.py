"""An answer in the shape of OpenAI's Responses API, whole and as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from ...errors import FlashError
from ..events import Done, Event, Progress, Reasoning, Text, Token, ToolCall, Usage
from ..http import sse
from .responses_input import Asked


class Answer:
    """Builds the response of the events that happen.

    Attributes:
        response: As it is at the moment; complete after `Done`.
    """

    def __init__(self, asked: Asked):
        self.response: dict[str, Any] = {
            "id": _new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": asked.model,
            "output": [],
            "usage": None,
            **asked.echo,
        }
        self._logprobs = asked.request.top_logprobs is not None
        self._item: dict[str, Any] | None = None  # the one that grows
        self._begun = False
        self._sequence = 0

    def lines(self, event: Event) -> Iterator[str]:
        """What a stream sends for an event."""
        for data in self.take(event):
            yield self._line(data)
        if isinstance(event, Progress):  # a comment, so that nobody gives up waiting
            yield f": {event.tokens} of {event.total} tokens of the prompt\n\n"

    def fail(self, error: FlashError) -> Iterator[str]:
        """What a stream sends when the answer fails."""
        self.response["status"] = "failed"
        self.response["error"] = {"code": "server_error", "message": str(error)}
        yield self._line({"type": "response.failed", "response": self.response})

    def take(self, event: Event) -> Iterator[dict[str, Any]]:
        """The API's events for one of ours.

        Send each before taking the next: they refer to what grows meanwhile.
        """
        if not self._begun:
            self._begun = True
            yield {"type": "response.created", "response": self.response}
            yield {"type": "response.in_progress", "response": self.response}
        if isinstance(event, Reasoning):
            if event.text:
                yield from self._grow("reasoning", event.text, ())
        elif isinstance(event, Text):
            if event.text or event.tokens:
                yield from self._grow("message", event.text, event.tokens)
        elif isinstance(event, ToolCall):
            yield from self._call(event)
        elif isinstance(event, Done):
            yield from self._end(event)

    def _line(self, data: dict[str, Any]) -> str:
        data["sequence_number"] = self._sequence
        self._sequence += 1
        return sse(data, data["type"])

    def _grow(
        self, kind: str, text: str, tokens: tuple[Token, ...]
    ) -> Iterator[dict[str, Any]]:
        """More text of the answer or of its reasoning."""
        part_kind = "output_text" if kind == "message" else "reasoning_text"
        if self._item is None or self._item["type"] != kind:
            yield from self._close("completed")
            item: dict[str, Any] = {
                "id": _new_id("msg" if kind == "message" else "rs"),
                "type": kind,
                "status": "in_progress",
                "content": [],
            }
            if kind == "message":
                item["role"] = "assistant"
            else:
                item["summary"] = []
            yield self._open(item)
            part: dict[str, Any] = {"type": part_kind, "text": ""}
            if kind == "message":
                part |= {"annotations": [], "logprobs": []}
            yield self._of_part("response.content_part.added") | {"part": part}
            item["content"].append(part)
        assert self._item is not None
        part = self._item["content"][0]
        part["text"] += text
        delta = self._of_part(f"response.{part_kind}.delta") | {"delta": text}
        if kind == "message":
            delta["logprobs"] = [_logprob(token) for token in tokens]
            part["logprobs"] += delta["logprobs"]
        yield delta

    def _call(self, call: ToolCall) -> Iterator[dict[str, Any]]:
        yield from self._close("completed")
        item = {
            "id": _new_id("fc"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
        }
        yield self._open(item)
        assert self._item is not None
        self._item["arguments"] = call.arguments
        where = self._of_item("response.function_call_arguments.delta")
        yield where | {"delta": call.arguments}
        where = self._of_item("response.function_call_arguments.done")
        yield where | {"arguments": call.arguments, "name": call.name}
        yield from self._close("completed")

    def _open(self, item: dict[str, Any]) -> dict[str, Any]:
        self._item = item
        self.response["output"].append(item)
        return {
            "type": "response.output_item.added",
            "output_index": len(self.response["output"]) - 1,
            "item": item,
        }

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        """End the item that grows, if one does."""
        item = self._item
        if item is None:
            return
        if item["type"] != "function_call":
            part = item["content"][0]
            done = self._of_part(f"response.{part['type']}.done")
            done["text"] = part["text"]
            if "logprobs" in part:
                done["logprobs"] = part["logprobs"]
            yield done
            yield self._of_part("response.content_part.done") | {"part": part}
        item["status"] = status
        yield {
            "type": "response.output_item.done",
            "output_index": len(self.response["output"]) - 1,
            "item": item,
        }
        self._item = None

    def _end(self, done: Done) -> Iterator[dict[str, Any]]:
        cut = done.reason == "length"
        status = "incomplete" if cut else "completed"
        yield from self._close(status)
        self.response["status"] = status
        if cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = int(time.time())
        self.response["usage"] = _usage(done.usage)
        yield {"type": f"response.{status}", "response": self.response}

    def _of_item(self, kind: str) -> dict[str, Any]:
        assert self._item is not None
        index = len(self.response["output"]) - 1
        return {"type": kind, "item_id": self._item["id"], "output_index": index}

    def _of_part(self, kind: str) -> dict[str, Any]:
        return self._of_item(kind) | {"content_index": 0}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "flash": usage.flash,
    }


def _logprob(token: Token) -> dict[str, Any]:
    top = [_piece(text, logprob) for _, text, logprob in token.top]
    return _piece(token.text, token.logprob) | {"top_logprobs": top}


def _piece(text: str, logprob: float) -> dict[str, Any]:
    raw = list(text.encode(errors="replace"))
    return {"token": text, "logprob": logprob, "bytes": raw}


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
