"""Answers that `previous_response_id` may name."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

MOST_BYTES = 16_000_000  # of all of them, as JSON


@dataclass(frozen=True)
class Kept:
    """An answer with the conversation before it.

    Attributes:
        response: As it was sent.
        items: What was asked and answered, as `input` of a request.
    """

    response: dict[str, Any]
    items: list[Any]


class KeptResponses:
    """Keeps answers in memory, and drops those that were used longest ago."""

    def __init__(self, most_bytes: int = MOST_BYTES):
        self._most_bytes = most_bytes
        self._kept: OrderedDict[str, tuple[int, Kept]] = OrderedDict()

    def keep(self, response: dict[str, Any], items: list[Any]) -> None:
        nbytes = len(json.dumps(response)) + len(json.dumps(items))
        if nbytes > self._most_bytes:
            return
        self._kept[response["id"]] = nbytes, Kept(response, items)
        while self.nbytes > self._most_bytes:
            self._kept.popitem(last=False)

    def find(self, id: str) -> Kept | None:
        if id not in self._kept:
            return None
        self._kept.move_to_end(id)
        return self._kept[id][1]

    def drop(self, id: str) -> bool:
        """Whether there was such an answer."""
        return self._kept.pop(id, None) is not None

    @property
    def nbytes(self) -> int:
        return sum(nbytes for nbytes, _ in self._kept.values())
