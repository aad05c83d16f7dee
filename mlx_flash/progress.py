"""How far something is, for a person who waits: a bar on a terminal, a line in a log.

A log gets one line when something begins, and no carriage returns.
"""

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")
QUICK_S = 0.5  # what takes no longer, draws no bar


def bars(
    items: Iterable[T], text: str, shown: bool | None = True, **options: Any
) -> Iterator[T]:
    """Go through `items`, of which there are `options["total"]` or `len(items)`.

    Args:
        shown: None draws a bar on a terminal and leaves logs alone, False does neither.
        options: Those of tqdm.
    """
    if "total" not in options and isinstance(items, Sized):
        options["total"] = len(items)
    with Bar(text, shown=shown, **options) as bar:
        for item in items:
            yield item
            bar.advance(1)


class Bar:
    """A bar with the time that is left, or a line where there is no terminal.

    Use it in `with`, or `close` it.
    """

    def __init__(
        self,
        text: str,
        total: int | None = None,
        shown: bool | None = True,
        **options: Any,
    ):
        self._drawn: Any = None
        if sys.stderr.isatty():
            if shown is not False:
                self._drawn = _tqdm(text, total, options)
        elif shown:
            print(_line(text, total, options), file=sys.stderr)

    def advance(self, by: int) -> None:
        if self._drawn is not None:
            self._drawn.update(by)

    def reach(self, done: int, total: int) -> None:
        """So much is done now. The bar goes away with the last of it."""
        if self._drawn is not None:
            self._drawn.total = total
            self._drawn.update(done - self._drawn.n)
            if done >= total:
                self.close()

    def close(self) -> None:
        if self._drawn is not None:
            self._drawn.close()
            self._drawn = None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tqdm(text: str, total: int | None, options: dict[str, Any]) -> Any:
    from tqdm import tqdm  # type: ignore[import-untyped]  # it comes without types

    settings = {"leave": False, "delay": QUICK_S, "file": sys.stderr} | options
    return tqdm(desc=text, **settings | {"total": total})


def _line(text: str, total: int | None, options: dict[str, Any]) -> str:
    """What is done, and how much of it there is."""
    if not total:
        return text
    done, unit = options.get("initial", 0), options.get("unit", "")
    if unit == "B":
        return f"{text}: {total / 1e6:,.1f} MB"
    rest = f", {done:,} of them done" if done else ""
    return f"{text}: {total:,} {unit}{'s' if unit and total != 1 else ''}{rest}"
