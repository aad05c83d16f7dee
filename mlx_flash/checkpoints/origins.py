"""Where the bytes of an array come from that mlx-lm made out of a checkpoint's tensors.

Each model of mlx-lm renames, stacks and splits tensors in its own `sanitize`. Nothing
of that is known here: MLX writes down what `sanitize` did, and what only moved bytes is
followed back to the tensor that holds them. What came out is tried on small tensors
before it is believed.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod

import mlx.core as mx
import numpy as np

from .views import Unreadable, Value, computed, move, whole

Arrays = dict[str, mx.array]
Sanitize = Callable[[Arrays], Arrays]

SMALL = 8  # the longest axis of a tensor that a trace is tried on
UNKNOWN = re.compile(r"state for primitive (\w+)")


def trace(sanitize: Sanitize, raw: Arrays, wanted: Sequence[str]) -> dict[str, Value]:
    """Which bytes of which tensors the arrays `wanted` consist of.

    Args:
        sanitize: The model's; it may be run several times.
        raw: The checkpoint's tensors. None is evaluated.
        wanted: Names that `sanitize` gives.

    Raises:
        Unreadable: If one of them is more than bytes of the files in another order.
    """
    names = list(raw)

    def run(*tensors: mx.array) -> list[mx.array]:
        made = sanitize(dict(zip(names, tensors, strict=True)))
        return [made[name] for name in wanted]

    lines: list[dict] = []
    try:
        with _contiguous_already():
            mx.export_function(lines.append, run, *raw.values())
    except Exception as error:  # of MLX, or of a sanitize that looks at values
        found = UNKNOWN.search(str(error))
        raise Unreadable(
            computed(found[1] if found else type(error).__name__)
        ) from None
    return _follow(lines, names, wanted)


def check(sanitize: Sanitize, raw: Arrays, traced: dict[str, Value]) -> None:
    """Try a trace: have `sanitize` move small tensors, and follow their bytes.

    Of layers whose tensors it moves alike, one is tried.

    Args:
        traced: What `trace` gave.

    Raises:
        Unreadable: If the bytes are others than the trace of these tensors says.
    """
    rng = np.random.default_rng(0)
    tried = {_manner(name, value): name for name, value in traced.items()}
    small, data = dict(raw), {}
    for value in (traced[name] for name in tried.values()):
        for view in value:
            if view.tensor in data:
                continue
            tensor = raw[view.tensor]
            # The first axis counts experts where a tensor has several.
            kept = 1 if view.shape[0] > 1 else 0
            shape = [
                min(n, SMALL) if i >= kept else n for i, n in enumerate(tensor.shape)
            ]
            size = prod(shape) * tensor.dtype.size
            data[view.tensor] = rng.integers(0, 256, size, np.uint8)
            array = mx.array(data[view.tensor]).view(tensor.dtype)
            small[view.tensor] = array.reshape(shape)
    try:
        made = sanitize(dict(small))
        followed = trace(sanitize, small, list(tried.values()))
        for name, value in followed.items():
            found = mx.contiguous(made[name]).reshape(-1).view(mx.uint8)
            if np.asarray(found).tobytes() != _bytes_of(value, data):
                raise Unreadable("what mlx-lm makes of it is not understood")
    except Unreadable:
        raise
    except Exception as error:  # each of mlx-lm's models fails in its own way
        reason = f"small tensors could not be tried ({type(error).__name__})"
        raise Unreadable(reason) from None


def _manner(name: str, value: Value) -> tuple:
    """The same for arrays of the same kind that were moved alike."""
    moves = [(view.offset, view.shape, view.strides, view.itemsize) for view in value]
    return *name.split(".")[-2:], *moves


def _bytes_of(value: Value, data: dict[str, np.ndarray]) -> bytes:
    pieces = []
    for view in value:
        unit_bytes = prod(view.shape[1:]) * view.itemsize
        for at in view.unit_offsets():
            pieces.append(data[view.tensor][at : at + unit_bytes].tobytes())
    return b"".join(pieces)


def _follow(
    lines: list[dict], names: list[str], wanted: Sequence[str]
) -> dict[str, Value]:
    """Follow bytes from the inputs of what MLX wrote down to its outputs."""
    outputs: list[str] = []
    values: dict[str, Value] = {}
    constants: set[str] = set()
    for line in lines:
        if line["type"] == "inputs":
            for name, (symbol, shape, dtype) in zip(names, line["inputs"], strict=True):
                values[symbol] = (whole(name, shape, dtype.size),)
        elif line["type"] == "outputs":
            outputs = [symbol for symbol, _, _ in line["outputs"]]
        elif line["type"] == "constants":
            constants = {symbol for symbol, _ in line["constants"]}
        elif line["type"] == "primitive":
            given = [symbol for symbol, _, _ in line["inputs"]]
            if constants.intersection(given) or not values.keys() >= set(given):
                raise Unreadable(computed(line["name"]))
            made = move(line["name"], line["arguments"], [values[x] for x in given])
            symbols = [symbol for symbol, _, _ in line["outputs"]]
            values |= zip(symbols, made, strict=True)
    if not values.keys() >= set(outputs):
        raise Unreadable("it is in no file")
    return dict(zip(wanted, (values[x] for x in outputs), strict=True))


@contextmanager
def _contiguous_already() -> Iterator[None]:
    """MLX cannot write down `mx.contiguous`, which changes no value: leave it out."""
    original = mx.contiguous
    setattr(mx, "contiguous", lambda array, *_, **__: array)  # noqa: B010
    try:
        yield
    finally:
        setattr(mx, "contiguous", original)  # noqa: B010
