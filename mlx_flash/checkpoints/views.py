"""Views into tensors of a file: what an array is that was moved, and not computed.

A value is one view, or several that follow each other along the first axis, as where
the experts of a layer are stacked. The names of moves are those of MLX's primitives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import mlx.core as mx


class Unreadable(Exception):
    """Why an array's units are no runs of bytes in a file."""


@dataclass(frozen=True)
class View:
    """Some values of a tensor, none of them evaluated.

    Attributes:
        tensor: Its name in the checkpoint.
        offset: Of the first value, in bytes from the tensor's first byte.
        shape, strides: As NumPy has them, strides in bytes.
        itemsize: Bytes of a value.
    """

    tensor: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    def unit_offsets(self) -> list[int]:
        """The first byte of each entry of the first axis.

        Raises:
            Unreadable: If an entry is not one run of bytes.
        """
        axes = zip(self.shape[1:], self.strides[1:], strict=True)
        inner = [(size, stride) for size, stride in axes if size > 1]
        if inner and inner[-1][1] != self.itemsize:
            raise Unreadable("it lies transposed in the files")
        expected = self.itemsize
        for size, stride in reversed(inner):
            if stride != expected:
                raise Unreadable("its rows lie apart in the files")
            expected *= size
        return [self.offset + i * self.strides[0] for i in range(self.shape[0])]


Value = tuple[View, ...]


def whole(tensor: str, shape: Sequence[int], itemsize: int) -> View:
    """A tensor as it lies in its file, in row-major order."""
    return View(tensor, 0, tuple(shape), _row_major(shape, itemsize), itemsize)


def move(primitive: str, arguments: Sequence[Any], values: list[Value]) -> list[Value]:
    """What a primitive of MLX makes of values.

    Raises:
        Unreadable: If it does more than to move them, or moves them in a way that is
            not known here.
    """
    if primitive == "Concatenate":
        if arguments[0] != 0:
            raise Unreadable("mlx-lm puts it together from several tensors")
        return [tuple(view for value in values for view in value)]
    step = MOVES.get(primitive)
    if step is None or len(values) != 1:
        raise Unreadable(computed(primitive))
    (value,) = values
    if len(value) > 1:
        rows = sum(view.shape[0] for view in value)
        if not _keeps_rows(primitive, arguments, rows):
            raise Unreadable("mlx-lm cuts it out of several tensors")
    columns = [step(view, *arguments) for view in value]
    return [tuple(pieces) for pieces in zip(*columns, strict=True)]


def computed(primitive: str) -> str:
    """The reason why what a primitive makes lies in no file."""
    if primitive == "FromFP8":
        return "the files have it in 8-bit floats (fp8), which mlx-lm unpacks"
    if primitive == "AsType":
        return "the files have it in another dtype"
    return f"mlx-lm computes it from what the files hold ({primitive})"


def _keeps_rows(primitive: str, arguments: Sequence[Any], rows: int) -> bool:
    """Whether each of several views can be moved alone: the first axis stays."""
    if primitive in ("ExpandDims", "Squeeze"):
        return min(arguments[0]) > 0
    if primitive == "Transpose":
        return arguments[0][0] == 0
    if primitive == "Slice":
        return [axis[0] for axis in arguments] == [0, rows, 1]
    if primitive == "Split":
        return arguments[1] > 0
    if primitive == "Reshape":
        return arguments[0][0] == rows
    return primitive in ("AsType", "View") or arguments[0] > 0


def _row_major(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * prod(shape[i + 1 :]) for i in range(len(shape)))


def _with_axes(view: View, axes: list[tuple[int, int]]) -> list[View]:
    shape, strides = zip(*axes, strict=True) if axes else ((), ())
    return [replace(view, shape=tuple(shape), strides=tuple(strides))]


def _axes(view: View) -> list[tuple[int, int]]:
    return list(zip(view.shape, view.strides, strict=True))


def _expand(view: View, new: Sequence[int]) -> list[View]:
    axes = _axes(view)
    for axis in sorted(new):
        axes.insert(axis, (1, 0))
    return _with_axes(view, axes)


def _squeeze(view: View, gone: Sequence[int]) -> list[View]:
    return _with_axes(view, [x for i, x in enumerate(_axes(view)) if i not in gone])


def _transpose(view: View, order: Sequence[int]) -> list[View]:
    axes = _axes(view)
    return _with_axes(view, [axes[i] for i in order])


def _slice(
    view: View, start: Sequence[int], stop: Sequence[int], step: Sequence[int]
) -> list[View]:
    if min(step) < 1:
        raise Unreadable("it lies the other way round in the files")
    offset, axes = view.offset, []
    for (size, stride), *cut in zip(_axes(view), start, stop, step, strict=True):
        chosen = range(size)[slice(*cut)]
        offset += chosen.start * stride
        axes.append((len(chosen), stride * chosen.step))
    return _with_axes(replace(view, offset=offset), axes)


def _split(view: View, indices: Sequence[int], axis: int) -> list[View]:
    ends = (*indices, view.shape[axis])
    pieces = []
    for first, last in zip((0, *indices), ends, strict=True):
        start = [0] * len(view.shape)
        stop = list(view.shape)
        start[axis], stop[axis] = first, last
        pieces += _slice(view, start, stop, [1] * len(view.shape))
    return pieces


def _flatten(view: View, first: int, last: int) -> list[View]:
    axes = _axes(view)
    size, stride = axes[last]
    for count, step in reversed(axes[first:last]):
        if size == 1:
            stride = step
        elif count > 1 and step != size * stride:
            raise Unreadable("its rows lie apart in the files")
        size *= count
    return _with_axes(view, [*axes[:first], (size, stride), *axes[last + 1 :]])


def _unflatten(view: View, axis: int, shape: Sequence[int]) -> list[View]:
    axes = _axes(view)
    inner = zip(shape, _row_major(shape, axes[axis][1]), strict=True)
    return _with_axes(view, [*axes[:axis], *inner, *axes[axis + 1 :]])


def _reshape(view: View, shape: Sequence[int]) -> list[View]:
    (flat,) = _flatten(view, 0, len(view.shape) - 1)
    # Of several views, each has its own part of the first axis.
    own = prod(view.shape) // prod(shape[1:])
    return _unflatten(flat, 0, (own, *shape[1:]))


def _view(view: View, dtype: mx.Dtype) -> list[View]:
    *axes, (size, stride) = _axes(view)
    if stride != view.itemsize:
        raise Unreadable("it lies transposed in the files")
    count = size * view.itemsize // dtype.size
    return _with_axes(replace(view, itemsize=dtype.size), [*axes, (count, dtype.size)])


MOVES: dict[str, Callable[..., list[View]]] = {
    "ExpandDims": _expand,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Slice": _slice,
    "Split": _split,
    "Flatten": _flatten,
    "Unflatten": _unflatten,
    "Reshape": _reshape,
    "View": _view,
}
