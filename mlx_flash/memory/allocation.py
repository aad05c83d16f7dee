"""Memory that MLX computes on and that files are read into."""

from math import prod

import mlx.core as mx
import numpy as np

from ..storage.limits import LARGE_PAGE_BYTES, PAGE_BYTES

WORD = 8  # bytes of the widest number that MLX and NumPy share


def allocate(shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, np.ndarray]:
    """An MLX array of zeros and a NumPy view of the same memory.

    Where direct I/O can read into its rows, the array begins on a page. MLX aligns to
    less: one page more is allocated, and the array is a view into it. MLX counts what
    is on an axis in int32, and so words of 8 bytes are allocated: 16 GiB at most.

    Returns:
        The array, and uint8 `[shape[0], bytes of a row]` over the same bytes.
    """
    part_bytes = prod(shape[1:]) * dtype.size
    if spare_bytes(part_bytes):
        array, view = _on_a_page(shape, dtype, part_bytes)
    else:
        array = mx.zeros(shape, dtype)
        mx.eval(array)
        view = _bytes_of(array)
    if _bytes_of(array).ctypes.data != view.ctypes.data:
        raise RuntimeError("this MLX copies where it used to share memory")
    return array, view


def _on_a_page(
    shape: tuple[int, ...], dtype: mx.Dtype, part_bytes: int
) -> tuple[mx.array, np.ndarray]:
    words = shape[0] * part_bytes // WORD
    raw = mx.zeros((words + spare_bytes(part_bytes) // WORD,), mx.uint64)
    mx.eval(raw)
    start = -np.asarray(raw).ctypes.data % LARGE_PAGE_BYTES // WORD
    flat = raw[start : start + words]
    # Rows before the dtype: no axis may count the bytes of all slots.
    array = flat.reshape(shape[0], -1).view(dtype).reshape(shape)
    mx.eval(flat, array)
    return array, np.asarray(flat).view(np.uint8).reshape(shape[0], -1)


def _bytes_of(array: mx.array) -> np.ndarray:
    """The memory of an evaluated array, uint8 `[rows, bytes of a row]`."""
    rows = array.reshape(len(array), -1).view(mx.uint8)
    return np.asarray(rows)


def spare_bytes(part_bytes: int) -> int:
    """What `allocate` takes beyond the slots of a part of this size."""
    return LARGE_PAGE_BYTES if part_bytes % PAGE_BYTES == 0 else 0
