"""Anthropic's Messages API: POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..fields import Refused
from ..http import collect, json_response, read_json, stream
from ..service import Service
from .anthropic_input import parse
from .anthropic_output import Answer
from .shared import one_call

PATH = "/v1/messages"


def routes(service: Service) -> list[Route]:
    """The API's endpoints."""

    async def create(http: Request) -> Response:
        asked = parse(await read_json(http), service.limits)
        events = service.answer(asked.request)
        if not asked.parallel:
            events = one_call(events)
        answer = Answer(asked)
        if asked.stream:
            return await stream(events, answer.lines, answer.fail, "text/event-stream")
        for event in await collect(http, events):
            for _ in answer.take(event):
                pass
        return json_response(answer.message)

    async def count(http: Request) -> Response:
        asked = parse(await read_json(http), service.limits, counting=True)
        tokens = await service.count_tokens(asked.request)
        return json_response({"input_tokens": tokens})

    async def refuse(http: Request) -> Response:
        raise Refused(f"{http.method} {http.url.path} is not there.", 404)

    return [
        Route(PATH, create, methods=["POST"]),
        Route(f"{PATH}/count_tokens", count, methods=["POST"]),
        Route(PATH + "/{rest:path}", refuse, methods=["GET", "POST", "DELETE"]),
    ]
