"""KV caches on several ranks: rank 0's are the truth, the others have copies.

Every rank runs the same calls, so that copies stay equal by themselves. In between,
whoever uses the model on rank 0 may do anything with a cache: trim it, copy it, load
another, put several into a batch. So before each call rank 0 compares what a cache is
with what the last call left. Where nothing changed, a number says which cache it is;
where only plain values did (an offset, after trimming), these are sent; else all is.
"""

import importlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from ..errors import FlashError
from ..storage.layout import dtype_name

# Modules whose classes may be named by another rank.
KNOWN = ("mlx_lm.models.cache", "mlx_flash.kv_cache")

Copy = Callable[[mx.array | None, Sequence[int], str], mx.array]


class Mirror:
    """Rank 0's side: says what the others need to know of a cache before a call."""

    def __init__(self) -> None:
        self._number_of: dict[int, int] = {}  # by id of a cache's first entry
        self._marks: dict[int, list] = {}
        self._gone: list[int] = []
        self._next = 0

    def describe(self, cache: Sequence[Any]) -> tuple[dict, list[mx.array]]:
        """(what to send as JSON, the arrays to send after it) of a cache."""
        message: dict[str, Any] = {}
        if self._gone:
            message["gone"], self._gone = self._gone, []
        number = self._number_of.get(id(cache[0]))
        marks = [_mark(entry) for entry in cache]
        if number is not None and len(self._marks[number]) == len(marks):
            message["number"] = number
            changes = [
                _changes(old, new)
                for old, new in zip(self._marks[number], marks, strict=True)
            ]
            if None not in changes:
                self._marks[number] = marks  # they learn it, even if no call follows
                return message | ({"plain": changes} if any(changes) else {}), []
        arrays: list[mx.array] = []
        message["number"] = self._numbered(cache[0]) if number is None else number
        self._marks[message["number"]] = []
        message["entries"] = [_pack(entry, arrays) for entry in cache]
        message["arrays"] = [[dtype_name(a.dtype), *a.shape] for a in arrays]
        return message, arrays

    def note(self, cache: Sequence[Any]) -> None:
        """Remember what a call left, which the others have as well."""
        self._marks[self._number_of[id(cache[0])]] = [_mark(entry) for entry in cache]

    def _numbered(self, entry: Any) -> int:
        number, key = self._next, id(entry)
        self._next += 1
        self._number_of[key] = number
        self._marks[number] = []
        weakref.finalize(entry, self._forget, key, number)
        return number

    def _forget(self, key: int, number: int) -> None:
        if self._number_of.get(key) == number:
            del self._number_of[key]
        self._marks.pop(number, None)
        self._gone.append(number)


class Copies:
    """The other ranks' side: caches as rank 0 describes them."""

    def __init__(self) -> None:
        self._caches: dict[int, list] = {}

    def apply(self, message: dict, copy: Copy) -> list:
        """The cache that a message means, in the state that rank 0 has it in.

        Args:
            copy: Brings an array of rank 0, given its shape and dtype.
        """
        for number in message.get("gone", ()):
            self._caches.pop(number, None)
        number = message["number"]
        if "entries" in message:
            arrays = [copy(None, shape, dtype) for dtype, *shape in message["arrays"]]
            packed = message["entries"]
            self._caches[number] = [_unpack(entry, arrays) for entry in packed]
        cache = self._caches[number]
        for entry, change in zip(cache, message.get("plain", ()), strict=False):
            _set(entry, change)
        return cache


def _parts(entry: Any) -> Iterator[tuple[str, Any]]:
    """All values of a cache entry by their paths, those of nested ones as well."""
    for name, value in vars(entry).items():
        if isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                if _is_cache(item):
                    for path, inner in _parts(item):
                        yield f"{name}.{i}.{path}", inner
                else:
                    yield f"{name}.{i}", item
            yield f"{name}.", len(value)
        elif _is_cache(value):
            for path, inner in _parts(value):
                yield f"{name}.{path}", inner
        else:
            yield name, value


def _mark(entry: Any) -> tuple[type, dict[str, Any]]:
    """What tells one state of an entry from another, without holding its memory.

    MLX changes keys and values in place: the same array with the same offset has the
    same content.
    """
    marks = {
        path: _Array(value) if isinstance(value, mx.array) else value
        for path, value in _parts(entry)
    }
    return type(entry), marks


class _Array:
    """Which array it was."""

    def __init__(self, array: mx.array):
        self._array = weakref.ref(array)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Array):
            return False
        array = self._array()
        return array is not None and array is other._array()

    __hash__ = None  # type: ignore[assignment]


def _changes(old: tuple, new: tuple) -> dict[str, Any] | None:
    """The plain values that differ; None if more than those does."""
    if old[0] is not new[0] or old[1].keys() != new[1].keys():
        return None
    changed = {path: v for path, v in new[1].items() if v != old[1][path]}
    for path, value in changed.items():
        nested = "." in path
        if nested or not isinstance(value, int | float | bool | str | None):
            return None
        if isinstance(old[1][path], _Array):
            return None
    return changed


def _set(entry: Any, change: dict[str, Any]) -> None:
    for name, value in change.items():
        setattr(entry, name, value)


def _is_cache(value: Any) -> bool:
    return type(value).__module__ in KNOWN


def _pack(value: Any, arrays: list[mx.array]) -> Any:
    """A value as JSON, its arrays by their places in `arrays`.

    Raises:
        FlashError: If a cache holds anything else.
    """
    if isinstance(value, mx.array):
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(item, arrays) for item in value]}
    if _is_cache(value):
        fields = {name: _pack(item, arrays) for name, item in vars(value).items()}
        return {"class": [type(value).__module__, type(value).__name__], "is": fields}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise FlashError(
        f"A cache with a {type(value).__name__} in it cannot be used on several "
        "machines. Run this model on one."
    )


def _unpack(packed: Any, arrays: list[mx.array]) -> Any:
    if not isinstance(packed, dict):
        return packed
    if "array" in packed:
        return arrays[packed["array"]]
    if "class" in packed:
        module, name = packed["class"]
        if module not in KNOWN:
            raise FlashError(f"{module} has no caches.")
        kind = getattr(importlib.import_module(module), name)
        entry = kind.__new__(kind)
        for field, value in packed["is"].items():
            setattr(entry, field, _unpack(value, arrays))
        return entry
    items = packed["tuple" if "tuple" in packed else "list"]
    values = [_unpack(item, arrays) for item in items]
    return tuple(values) if "tuple" in packed else values
