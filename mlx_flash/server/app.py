"""The web application: which API answers at which path, behind `guards`."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .apis import anthropic, flash, ollama, openai, page, responses
from .failures import HANDLERS
from .guards import Guards
from .monitor import Monitor
from .service import Service
from .settings import Settings


def make_app(service: Service, settings: Settings, monitor: Monitor) -> Starlette:
    """The application that answers with `service`, whose model `monitor` sees."""
    metered = monitor.meter.of

    async def health(http: Request) -> Response:
        well = service.is_healthy
        body = {"status": "ok" if well else "unavailable"}
        return JSONResponse(body, 200 if well else 503)

    # Ollama's is the last: it takes all that begins with /api/.
    apis = {
        "openai": openai,
        "responses": responses,
        "anthropic": anthropic,
        "ollama": ollama,
    }
    routes = [
        route
        for name, api in apis.items()
        for route in api.routes(metered(service, name))
    ]
    return Starlette(
        routes=[
            Route("/health", health),
            *page.routes(),
            *flash.routes(service, monitor),
            *routes,
        ],
        middleware=[Middleware(Guards, settings=settings)],
        exception_handlers=HANDLERS,
    )
