"""What the operating system says of this process."""

import ctypes
import multiprocessing
import os
import resource
import struct
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_flash.errors import FlashError
from mlx_flash.loading import load_model
from mlx_flash.memory import system
from mlx_flash.memory.system import peak_process_bytes


def test_a_childs_peak_is_its_own():
    block = np.ones(40_000_000)  # 320 MB
    mine = peak_process_bytes()
    assert mine >= block.nbytes
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        child = pool.apply(peak_process_bytes)
    assert child < mine - block.nbytes / 2


class LibProc:
    """macOS's `proc_pid_rusage`, which fills what `rusage_info_v4` is 296 bytes of.

    Offsets are those of Darwin's sys/resource.h; `.ci/macos` compares them with it.
    """

    def __init__(self, now, most, code=0):
        self.now, self.most, self.code = now, most, code

    def proc_pid_rusage(self, pid, flavor, buffer):
        assert pid == os.getpid() and flavor == 4
        assert ctypes.sizeof(buffer._obj) == 296
        struct.pack_into("=Q", buffer._obj, 72, self.now)
        struct.pack_into("=Q", buffer._obj, 240, self.most)
        return self.code


@pytest.fixture
def on_macos(monkeypatch):
    """on_macos(…) → a Mac whose kernel says so of this process."""

    def pretend(*args):
        monkeypatch.setattr(system, "sys", SimpleNamespace(platform="darwin"))
        monkeypatch.setattr(system, "_libproc", lambda: LibProc(*args))

    return pretend


def test_macos_counts_the_footprint_which_has_metals_buffers(on_macos):
    on_macos(3 * 10**9, 5 * 10**9)
    assert system.process_bytes() == 3 * 10**9
    assert peak_process_bytes() == 5 * 10**9


def test_a_kernel_that_does_not_say_leaves_the_resident_memory(on_macos):
    on_macos(3, 5, -1)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak_process_bytes() >= most > 5
    assert system.process_bytes() > 10**6


def test_memory_of_now_and_at_most(monkeypatch):
    block = np.ones(10_000_000)
    now = system.process_bytes()
    assert block.nbytes < now <= peak_process_bytes()


GPU = {"max_recommended_working_set_size": 24 * 10**9, "memory_size": 32 * 10**9}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: GPU)


def test_more_memory_than_the_gpu_may_use(gpu):
    system.check_gpu_memory(24 * 10**9)
    with pytest.raises(FlashError) as error:
        system.check_gpu_memory(28 * 10**9)
    assert str(error.value) == (
        "28GB of memory are more than the 24.0 GB that the GPU may use. Give less with "
        "--memory, or allow it until the next start of the machine: sudo sysctl "
        "iogpu.wired_limit_mb=26703"
    )
    assert 26703 * 2**20 >= 28 * 10**9 > 26702 * 2**20


def test_more_memory_than_the_machine_has(gpu):
    with pytest.raises(FlashError) as error:
        system.check_gpu_memory(40 * 10**9)
    assert "of this machine's 32.0 GB" in str(error.value)
    assert "sysctl" in str(error.value)


def test_a_cpu_has_no_such_limit(monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "a CPU"})
    system.check_gpu_memory(10**15)


def test_load_refuses_before_it_reads(gpu, monkeypatch, flash_folder):
    small = GPU | {"max_recommended_working_set_size": 90_000}
    monkeypatch.setattr(mx, "device_info", lambda: small)
    with pytest.raises(FlashError, match=r"iogpu\.wired_limit_mb=1$"):
        load_model(flash_folder, "1MB")


def test_what_the_model_can_use_counts_and_not_what_was_given(gpu, flash_folder):
    with load_model(flash_folder, "30GB") as (model, _):
        assert model.flash.budget.total_bytes == 30 * 10**9
