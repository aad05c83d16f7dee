"""Slots whose part is larger than MLX can count on one axis: shapes are int32."""

import mlx.core as mx
import numpy as np
import psutil
import pytest

from mlx_flash.memory.allocation import allocate
from mlx_flash.storage.limits import LARGE_PAGE_BYTES

LIMIT = 2**31  # numbers on an axis that MLX refuses


@pytest.mark.skipif(
    psutil.virtual_memory().available < 8e9, reason="allocates 2.2 GB and a little"
)
@pytest.mark.parametrize("row", [(2**20,), (2**20 + 6,)], ids=["pages", "odd"])
def test_more_than_2_gib_in_one_part(row):
    array, view = allocate((1050, *row), mx.float16)
    assert array.nbytes == view.nbytes > LIMIT
    assert array.shape == (1050, *row) and view.shape == (1050, 2 * row[0])
    view[-1] = np.full(row, 3, np.float16).view(np.uint8)
    assert (array[mx.array([1049, 0], mx.uint32)][:, -1].tolist()) == [3, 0]
    if 2 * row[0] % LARGE_PAGE_BYTES == 0:
        assert view.ctypes.data % LARGE_PAGE_BYTES == 0
