"""Memory that MLX computes on and that files are read into."""

from math import prod

import mlx.core as mx
import numpy as np

from ..storage.limits import LARGE_PAGE_BYTES, PAGE_BYTES


def allocate(shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, np.ndarray]:
    """An MLX array of zeros and a NumPy view of the same memory.

    Where direct I/O can read into its rows, the array begins on a page. MLX aligns to
    less: one page more is allocated, and the array is a view into it.

    Returns:
        The array, and uint8 `[shape[0], bytes of a row]` over the same bytes.
    """
    nbytes = prod(shape) * dtype.size
    spare = spare_bytes(nbytes // shape[0])
    raw = mx.zeros((nbytes + spare,), mx.uint8)
    mx.eval(raw)
    address = np.asarray(raw).__array_interface__["data"][0]
    start = -address % LARGE_PAGE_BYTES if spare else 0
    flat = raw[start : start + nbytes]
    array = flat.view(dtype).reshape(shape)
    mx.eval(flat, array)
    view = np.asarray(flat).reshape(shape[0], -1)
    if np.asarray(array.view(mx.uint8)).ctypes.data != view.ctypes.data:
        raise RuntimeError("this MLX copies where it used to share memory")
    return array, view


def spare_bytes(part_bytes: int) -> int:
    """What `allocate` takes beyond the slots of a part of this size."""
    return LARGE_PAGE_BYTES if part_bytes % PAGE_BYTES == 0 else 0
