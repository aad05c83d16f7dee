"""Checks for the fields of a request's body, for every API."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

from ..errors import FlashError


class Refused(FlashError):
    """A request that gets an error for an answer.

    Attributes:
        status: Of HTTP.
    """

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What the loaded model allows.

    Attributes:
        name: What it is called.
        names: What a request may call it.
        vocabulary: Its number of token ids.
        tokens: Of a prompt and its answer together.
    """

    name: str
    names: frozenset[str]
    vocabulary: int
    tokens: int


def number(name: str, value: Any, low: float, high: float) -> float:
    # NaN is in no range.
    if type(value) not in (int, float) or not low <= value <= high:
        raise Refused(
            f"{name} must be a number from {low:g} to {high:g}, found {say(value)}."
        )
    return float(value)


def whole(name: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise Refused(
            f"{name} must be a whole number from {low} to {high}, found {say(value)}."
        )
    return value


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise Refused(f"{name} must be true or false, found {say(value)}.")
    return value


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise Refused(f"{name} must be text, found {say(value)}.")
    return value


def json_object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused(f"{name} must be a JSON object, found {say(value)}.")
    return value


def say(value: Any) -> str:
    return reprlib.repr(value)
