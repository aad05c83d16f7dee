"""Count what clients ask for and what becomes of it, between the APIs and the service.

All of it happens in the server's own thread, so nothing is locked.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Histogram

from .events import Done, Event, Progress
from .fields import Refused
from .request import Request
from .service import Service

FIRST_TOKEN_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
ANSWER_S = (0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)


@dataclass
class Meter:
    """What was asked of a server since it started.

    Attributes:
        requests: How many ended, by API and outcome: a `Done`'s reason, "refused",
            "failed", or "left" where the client went away.
        prompt_tokens, cached_tokens, generated_tokens: Of the answers that were given;
            cached ones are those of the prompts that a kept KV cache had.
        live: Requests that wait or are being answered.
        progress: How far the prompt that is read at the moment is, if one is.
        registry: Has the histograms, for `metrics`.
        first_token_s: From a request to the first piece of its answer.
        answer_s: From a request to the end of its answer.
    """

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    live: int = 0
    progress: Progress | None = None
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        self.first_token_s = Histogram(
            "mlx_flash_time_to_first_token_seconds",
            "From a request to the first piece of its answer.",
            buckets=FIRST_TOKEN_S,
            registry=self.registry,
        )
        self.answer_s = Histogram(
            "mlx_flash_request_duration_seconds",
            "From a request to the end of its answer.",
            buckets=ANSWER_S,
            registry=self.registry,
        )

    @property
    def running(self) -> int:
        """Requests that are being answered: one at a time."""
        return min(self.live, 1)

    @property
    def waiting(self) -> int:
        return self.live - self.running

    def of(self, service: Service, api: str) -> Service:
        """`service` with its answers counted, as asked for by `api`."""
        return _Metered(self, service, api)

    def note(self, event: Event) -> None:
        """Take in an event of an answer."""
        if isinstance(event, Progress):
            if event.tokens or self.live == 1:  # those that wait are at none
                self.progress = event
            return
        self.progress = None
        if not isinstance(event, Done):
            return
        usage = event.usage
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.generated_tokens += usage.completion_tokens


class _Metered:
    """A service that tells a meter of every answer."""

    def __init__(self, meter: Meter, service: Service, api: str):
        self._meter = meter
        self._service = service
        self._api = api
        self.limits = service.limits
        self.facts = service.facts

    @property
    def is_healthy(self) -> bool:
        return self._service.is_healthy

    async def count_tokens(self, request: Request) -> int:
        return await self._service.count_tokens(request)

    async def answer(self, request: Request) -> AsyncIterator[Event]:
        """As `Service.answer`."""
        meter, since = self._meter, time.perf_counter()
        spoke = False
        outcome = "left"
        meter.live += 1
        events = self._service.answer(request)
        try:
            async with contextlib.aclosing(events):  # type: ignore[type-var]
                async for event in events:
                    meter.note(event)
                    if not spoke and not isinstance(event, Progress):
                        spoke = True
                        meter.first_token_s.observe(time.perf_counter() - since)
                    if isinstance(event, Done):
                        outcome = event.reason
                    yield event
        except Refused:
            outcome = "refused"
            raise
        except Exception:
            outcome = "failed"
            raise
        finally:
            meter.live -= 1
            if not meter.live:
                meter.progress = None
            meter.answer_s.observe(time.perf_counter() - since)
            meter.requests[self._api, outcome] += 1
