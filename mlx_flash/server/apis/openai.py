"""OpenAI's chat and completions API, as mlx-lm's server speaks it.

Besides OpenAI's fields: `reasoning` of a message has what the model thought, and
`usage.flash` what the answer cost.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from starlette import requests
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ... import __version__
from ...errors import FlashError
from .. import fields
from ..bodies import read_request
from ..events import Done, Event, Progress, Reasoning, Text, Token, ToolCall, Usage
from ..failures import error_body
from ..fields import Refused
from ..http import collect, read_json, sse, stream
from ..service import Service

CHATS = ("/v1/chat/completions", "/chat/completions")
COMPLETIONS = "/v1/completions"
MODELS = "/v1/models"
DONE = "[DONE]"


def routes(service: Service) -> list[Route]:
    """The paths of this API, answered by `service`."""
    started = int(time.time())
    # Both OpenAI's and Anthropic's clients ask at the same path.
    anthropic_fields = {
        "type": "model",
        "display_name": service.limits.name,
        "created_at": datetime.fromtimestamp(started, UTC).isoformat(),
        "lifecycle": "active",
        "max_input_tokens": service.limits.tokens,
    }

    async def chat(http: requests.Request) -> Response:
        return await _answer(http, service, ChatShape)

    async def completion(http: requests.Request) -> Response:
        return await _answer(http, service, TextShape)

    async def models(http: requests.Request) -> Response:
        name = http.path_params.get("name", "")
        if name and name not in service.limits.names:
            raise Refused(f"There is no model {name!r} here.", 404)
        entry = {
            "id": service.limits.name,
            "object": "model",
            "created": started,
            "owned_by": "mlx-flash",
            **anthropic_fields,
        }
        if name:
            return JSONResponse(entry)
        paging = {"has_more": False, "first_id": entry["id"], "last_id": entry["id"]}
        return JSONResponse({"object": "list", "data": [entry]} | paging)

    return [
        *(Route(path, chat, methods=["POST"]) for path in CHATS),
        Route(COMPLETIONS, completion, methods=["POST"]),
        Route(MODELS, models),
        Route(MODELS + "/{name:path}", models),
    ]


async def _answer(
    http: requests.Request, service: Service, make_shape: type[Shape]
) -> Response:
    body = await read_json(http)
    request = read_request(body, make_shape is ChatShape, service.limits)
    streamed = fields.flag("stream", body.get("stream", False))
    shape = make_shape(service.limits.name, streamed, body)
    events = service.answer(request)
    if streamed:
        return await stream(events, shape.lines, shape.fail, "text/event-stream")
    return JSONResponse(shape.whole(await collect(http, events)))


class Shape:
    """How events become an answer; the two APIs differ in what a choice has."""

    prefix = object_name = chunk_name = ""

    def __init__(self, model: str, streamed: bool, body: dict[str, Any]):
        """
        Args:
            model: Its name.
            streamed: Whether the answer is sent in chunks.
            body: Of the request.

        Raises:
            Refused: If it has stream options that cannot be.
        """
        options = fields.json_object("stream_options", body.get("stream_options", {}))
        usage = options.get("include_usage", False)
        self._tells_usage = fields.flag("stream_options.include_usage", usage)
        self._counted = type(body.get("logprobs")) is int
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4()}",
            "system_fingerprint": f"mlx-flash-{__version__}",
            "object": self.chunk_name if streamed else self.object_name,
            "model": model,
            "created": int(time.time()),
        }

    def lines(self, event: Event) -> Iterable[str]:
        """The server-sent events for one of ours."""
        if isinstance(event, Progress):
            # A comment, which keeps the connection alive.
            yield f": keepalive {event.tokens}/{event.total}\n\n"
        elif isinstance(event, Done):
            yield self._chunk(self._choice([], event.reason, streamed=True))
            if self._tells_usage:
                usage = {"choices": [], "usage": _usage(event.usage)}
                yield sse(self._head | usage)
            yield sse(DONE)
        else:
            yield self._chunk(self._choice([event], None, streamed=True))

    def fail(self, error: FlashError) -> Iterable[str]:
        """What ends a stream that cannot be finished."""
        yield sse(error_body(str(error), 500))

    def whole(self, events: list[Event]) -> dict[str, Any]:
        """The answer that is sent at once."""
        done = events[-1]
        assert isinstance(done, Done)
        choice = self._choice(events, done.reason, streamed=False)
        return self._head | {"choices": [choice], "usage": _usage(done.usage)}

    def _chunk(self, choice: dict[str, Any]) -> str:
        return sse(self._head | {"choices": [choice]})

    def _choice(
        self, events: Sequence[Event], reason: str | None, streamed: bool
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": reason,
            "logprobs": None,
        }
        told = [x for x in events if isinstance(x, Text | Reasoning)]
        tokens = [token for event in told for token in event.tokens]
        if tokens:
            log = _counted_logprobs if self._counted else _logprobs
            choice["logprobs"] = log(tokens)
        return choice | self._content(events, streamed)

    def _content(self, events: Sequence[Event], streamed: bool) -> dict[str, Any]:
        raise NotImplementedError


class ChatShape(Shape):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    _calls = 0  # that the chunks have told so far

    def _content(self, events: Sequence[Event], streamed: bool) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant"}
        text = _joined(events, Text)
        reasoning = _joined(events, Reasoning)
        if text or not streamed:
            message["content"] = text or None
        if reasoning:
            message["reasoning"] = reasoning
        calls = [_call(event) for event in events if isinstance(event, ToolCall)]
        if streamed:
            for call in calls:
                call["index"] = self._calls
                self._calls += 1
        if calls:
            message["tool_calls"] = calls
        return {"delta" if streamed else "message": message}


class TextShape(Shape):
    """Of /v1/completions."""

    prefix = "cmpl"
    object_name = chunk_name = "text_completion"

    def _content(self, events: Sequence[Event], streamed: bool) -> dict[str, Any]:
        return {"text": _joined(events, Text)}


def _joined(events: Sequence[Event], kind: type[Text] | type[Reasoning]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def _call(event: ToolCall) -> dict[str, Any]:
    function = {"name": event.name, "arguments": event.arguments}
    return {"id": event.id, "type": "function", "function": function}


def _usage(usage: Usage) -> dict[str, Any]:
    found = asdict(usage)
    cached = {"cached_tokens": found.pop("cached_tokens")}
    reasoning = {"reasoning_tokens": found.pop("reasoning_tokens")}
    total = usage.prompt_tokens + usage.completion_tokens
    return found | {
        "total_tokens": total,
        "prompt_tokens_details": cached,
        "completion_tokens_details": reasoning,
    }


def _logprobs(tokens: list[Token]) -> dict[str, Any]:
    def entry(id: int, text: str, logprob: float) -> dict[str, Any]:
        raw = list(text.encode())
        return {"id": id, "token": text, "logprob": logprob, "bytes": raw}

    content = [
        entry(token.id, token.text, token.logprob)
        | {"top_logprobs": [entry(*other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _counted_logprobs(tokens: list[Token]) -> dict[str, Any]:
    """The older shape, which completions have where `logprobs` is a number."""
    offsets, end = [], 0
    for token in tokens:
        offsets.append(end)
        end += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{text: p for _, text, p in token.top} for token in tokens],
        "text_offset": offsets,
    }
