"""What only this server has: its state, live, and its metrics.

`GET /api/flash/state` is one picture as JSON (`state.State`), `GET /api/flash/stream`
one after the other as server-sent events, `GET /metrics` is for Prometheus.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from ..http import sse
from ..metrics import FlashCollector, scrape
from ..monitor import Monitor
from ..service import Service

PERIOD_S = 0.25
IDLE_S = 5.0  # what other programs take of the machine's memory changes, too


def routes(service: Service, monitor: Monitor) -> list[Route]:
    """The routes that show what `monitor` sees, until `service` ends."""
    collector = FlashCollector(monitor)

    async def state(http: Request) -> Response:
        return Response(monitor.json(), media_type="application/json")

    async def stream(http: Request) -> Response:
        return StreamingResponse(
            pictures(service, monitor), media_type="text/event-stream"
        )

    async def metrics(http: Request) -> Response:
        return Response(scrape(monitor, collector), media_type=CONTENT_TYPE_LATEST)

    return [
        Route("/api/flash/state", state),
        Route("/api/flash/stream", stream),
        Route("/metrics", metrics),
    ]


async def pictures(service: Service, monitor: Monitor) -> AsyncIterator[str]:
    """A picture four times a second while something changes, else every five."""
    shown: tuple | None = None
    waited_s = 0.0
    while service.is_healthy:
        mark = monitor.mark()
        if mark != shown or waited_s >= IDLE_S:
            shown, waited_s = mark, 0.0
            yield sse(monitor.json())
        await asyncio.sleep(PERIOD_S)
        waited_s += PERIOD_S
