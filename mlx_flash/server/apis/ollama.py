"""Ollama's API, as far as one loaded model has it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..._version import __version__
from ..fields import Refused
from ..http import collect, json_response, read_json, stream
from ..service import Service
from .ollama_input import Asked, own_name, parse_chat, parse_generate
from .ollama_output import (
    Answer,
    description,
    model_entry,
    running_entry,
)

NDJSON = "application/x-ndjson"
# The release whose fields these are: clients ask for at least some number.
VERSION = f"0.12.11-mlx-flash.{__version__}"


def routes(service: Service) -> list[Route]:
    """The API's endpoints."""
    api = _Ollama(service)
    table = (
        ("chat", "POST", api.chat),
        ("generate", "POST", api.generate),
        ("tags", "GET", api.tags),
        ("ps", "GET", api.running),
        ("show", "POST", api.show),
        ("version", "GET", api.version),
        ("pull", "POST", api.pull),
    )
    made = [
        Route(f"/api/{name}", handler, methods=[method])
        for name, method, handler in table
    ]
    methods = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    return [*made, Route("/api/{rest:path}", api.refuse, methods=methods)]


class _Ollama:
    def __init__(self, service: Service):
        self._service = service

    async def chat(self, http: Request) -> Response:
        body = await read_json(http)
        asked = parse_chat(body, self._service.limits, self._service.facts)
        return await self._answer(http, asked, chat=True)

    async def generate(self, http: Request) -> Response:
        body = await read_json(http)
        asked = parse_generate(body, self._service.limits, self._service.facts)
        return await self._answer(http, asked, chat=False)

    async def _answer(self, http: Request, asked: Asked, chat: bool) -> Response:
        answer = Answer(asked.model, chat)
        if asked.request is None:
            return json_response(answer.loaded())
        events = self._service.answer(asked.request)
        if asked.stream:
            return await stream(events, answer.lines, answer.fail, NDJSON)
        return json_response(answer.whole(await collect(http, events)))

    async def tags(self, http: Request) -> Response:
        entry = model_entry(self._service.limits, self._service.facts)
        return json_response({"models": [entry]})

    async def running(self, http: Request) -> Response:
        entry = running_entry(self._service.limits, self._service.facts)
        return json_response({"models": [entry]})

    async def show(self, http: Request) -> Response:
        own_name(await read_json(http), self._service.limits)
        return json_response(description(self._service.limits, self._service.facts))

    async def version(self, http: Request) -> Response:
        return json_response({"version": VERSION})

    async def pull(self, http: Request) -> Response:
        """Programs pull a model before they use it; the loaded one is there."""
        own_name(await read_json(http), self._service.limits)
        return json_response({"status": "success"})

    async def refuse(self, http: Request) -> Response:
        raise Refused(
            f"{http.method} {http.url.path} is not there: this server runs the one "
            "model that it was started with, and answers /api/chat, /api/generate, "
            "/api/tags, /api/ps, /api/show and /api/version.",
            501,
        )
