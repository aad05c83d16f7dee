"""What the operating system says of this process."""

import multiprocessing

import numpy as np

from mlx_flash.memory.system import peak_process_bytes


def test_a_childs_peak_is_its_own():
    block = np.ones(40_000_000)  # 320 MB
    mine = peak_process_bytes()
    assert mine >= block.nbytes
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        child = pool.apply(peak_process_bytes)
    assert child < mine - block.nbytes / 2
