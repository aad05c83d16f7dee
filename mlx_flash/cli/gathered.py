"""Options that belong together reach a command as one object."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any


def gathered(
    name: str, kind: type[Any], options: Sequence[Callable]
) -> Callable[[Callable], Callable]:
    """A decorator that adds `options` to a command, which gets them as one `kind`.

    Args:
        name: Of the command's parameter.
        kind: A dataclass whose fields are called like the options.
        options: Of click, in the order of `--help`.
    """
    names = [field.name for field in dataclasses.fields(kind)]

    def add(command: Callable) -> Callable:
        @functools.wraps(command)
        def call(*args: Any, **values: Any) -> Any:
            values[name] = kind(**{field: values.pop(field) for field in names})
            return command(*args, **values)

        for option in reversed(options):
            call = option(call)
        return call

    return add
