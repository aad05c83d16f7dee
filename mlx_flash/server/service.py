"""What an API may ask of the server; the worker provides it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from .events import Event
from .facts import Facts
from .fields import Limits
from .request import Request


class Service(Protocol):
    """Answers requests, whichever API they came by.

    Attributes:
        limits, facts: Of the loaded model.
        is_healthy: Whether requests are still answered.
    """

    limits: Limits
    facts: Facts

    @property
    def is_healthy(self) -> bool: ...

    def answer(self, request: Request) -> AsyncIterator[Event]:
        """The events of one answer; the last is a `Done`.

        Closing the iterator, or cancelling the task that awaits it, ends the answer.

        Raises:
            Refused: Before the first event, if the request cannot be answered.
            FlashError: At any event, if the answer fails.
        """
        ...

    async def count_tokens(self, request: Request) -> int:
        """How many tokens the prompt of a request has.

        Raises:
            Refused: If it cannot be encoded.
        """
        ...
