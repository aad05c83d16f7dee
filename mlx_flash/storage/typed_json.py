"""Dataclasses from JSON that somebody may have altered."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from ..errors import FlashError

MAX_INT = 2**63  # no size or offset reaches it


def from_json(kind: Any, value: Any, path: Path, where: str) -> Any:
    """Make `kind` from parsed JSON, each field of the type that it declares.

    Args:
        kind: A dataclass, or the type of a field. Fields with a default may be missing.
        value: What `json.loads` gave.
        path, where: The file and the place in it, for the error.

    Raises:
        FlashError: If a field without a default is missing, or one has another type.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise FlashError(f"{path}: {where} must be an object.")
        hints = typing.get_type_hints(kind)
        missing = sorted(_required(kind) - set(value))
        if missing:
            raise FlashError(f"{path}: {where} lacks {', '.join(missing)}.")
        fields = {
            k: from_json(t, value[k], path, f"{where}.{k}")
            for k, t in hints.items()
            if k in value
        }
        return kind(**fields)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else from_json(args[0], value, path, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise FlashError(f"{path}: {where} must be a list.")
        return tuple(from_json(args[0], v, path, where) for v in value)
    if kind is float and type(value) is int and abs(value) < MAX_INT:
        value = float(value)
    # A bool is an int to Python, and no manifest field is meant to be one.
    if type(value) is not kind or (kind is int and not 0 <= value < MAX_INT):
        raise FlashError(f"{path}: {where} must be {kind.__name__}, found {value!r}.")
    return value


def _required(kind: Any) -> set[str]:
    missing = dataclasses.MISSING
    return {
        field.name
        for field in dataclasses.fields(kind)
        if field.default is missing and field.default_factory is missing
    }
