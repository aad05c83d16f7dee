"""The web application: which API answers at which path, behind `guards`."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .apis import openai
from .failures import HANDLERS
from .guards import Guards
from .service import Service
from .settings import Settings


def make_app(service: Service, settings: Settings) -> Starlette:
    """The application that answers with `service`."""

    async def health(http: Request) -> Response:
        well = service.is_healthy
        body = {"status": "ok" if well else "unavailable"}
        return JSONResponse(body, 200 if well else 503)

    return Starlette(
        routes=[Route("/health", health), *openai.routes(service)],
        middleware=[Middleware(Guards, settings=settings)],
        exception_handlers=HANDLERS,
    )
