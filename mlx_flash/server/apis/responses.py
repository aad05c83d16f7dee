"""OpenAI's Responses API: POST /v1/responses, and what it kept."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..fields import Refused, say
from ..http import collect, json_response, read_json, stream
from ..service import Service
from .kept_responses import Kept, KeptResponses
from .responses_input import Asked, parse
from .responses_output import Answer
from .shared import one_call

PATH = "/v1/responses"


def routes(service: Service) -> list[Route]:
    """The API's endpoints."""
    api = _Responses(service)
    table = (
        (PATH, "POST", api.create),
        (f"{PATH}/input_tokens", "POST", api.count),
        (PATH + "/{id}", "GET", api.retrieve),
        (PATH + "/{id}", "DELETE", api.delete),
        (PATH + "/{id}/{what}", "GET", api.refuse),
        (PATH + "/{id}/{what}", "POST", api.refuse),
    )
    return [Route(path, handler, methods=[method]) for path, method, handler in table]


class _Responses:
    def __init__(self, service: Service):
        self._service = service
        self._kept = KeptResponses()

    async def create(self, http: Request) -> Response:
        asked = await self._parse(http)
        events = self._service.answer(asked.request)
        if not asked.parallel:
            events = one_call(events)
        answer = Answer(asked)
        if not asked.stream:
            for event in await collect(http, events):
                for _ in answer.take(event):
                    pass
            self._keep(asked, answer)
            return json_response(answer.response)

        def render(event):
            yield from answer.lines(event)
            self._keep(asked, answer)

        return await stream(events, render, answer.fail, "text/event-stream")

    async def count(self, http: Request) -> Response:
        asked = await self._parse(http)
        tokens = await self._service.count_tokens(asked.request)
        return json_response(
            {"object": "response.input_tokens", "input_tokens": tokens}
        )

    async def retrieve(self, http: Request) -> Response:
        return json_response(self._find(http).response)

    async def delete(self, http: Request) -> Response:
        id = self._find(http).response["id"]
        self._kept.drop(id)
        return json_response({"id": id, "object": "response", "deleted": True})

    async def refuse(self, http: Request) -> Response:
        raise Refused(f"{http.method} {http.url.path} is not there.", 404)

    async def _parse(self, http: Request) -> Asked:
        return parse(await read_json(http), self._service.limits, self._kept)

    def _find(self, http: Request) -> Kept:
        id = http.path_params["id"]
        found = self._kept.find(id)
        if found is None:
            raise Refused(f"There is no response {say(id)}, or not any more.", 404)
        return found

    def _keep(self, asked: Asked, answer: Answer) -> None:
        """Keep an answer that is complete, if the client wants that."""
        response = answer.response
        if asked.store and response["usage"] is not None:
            self._kept.keep(response, asked.items + response["output"])
