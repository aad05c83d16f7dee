"""What the machine has free, and what this process takes of it."""

import ctypes
import functools
import os
import resource
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil

from ..errors import FlashError
from ..memory_size import say_memory
from . import pressure

RUSAGE_INFO_V4 = 4


class Usage(ctypes.Structure):
    """Two fields of Darwin's `rusage_info_v4`; .ci/macos checks their places."""

    _fields_ = (
        ("_before", ctypes.c_uint8 * 72),
        ("phys_footprint", ctypes.c_uint64),
        ("_between", ctypes.c_uint8 * 160),
        ("lifetime_max_phys_footprint", ctypes.c_uint64),
        ("_after", ctypes.c_uint8 * 48),
    )


def process_bytes() -> int:
    """The memory that this process takes now, in bytes.

    On macOS its physical footprint, as the Activity Monitor shows it: resident memory
    leaves out what the GPU's buffers take.
    """
    usage = _usage()
    return usage.phys_footprint if usage else psutil.Process().memory_info().rss


def peak_process_bytes() -> int:
    """The most memory that this process has taken, counted as `process_bytes` does."""
    if sys.platform == "darwin":
        usage = _usage()
        if usage:
            return usage.lifetime_max_phys_footprint
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux hands ru_maxrss on to children, exec or not: it may be the parent's.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def usable_memory_bytes() -> int:
    """What a run may take without harming the machine: nine tenths of what is free.

    On Apple silicon the GPU's recommended working set bounds it as well.
    """
    free = pressure.available_bytes()
    working_set = mx.device_info().get("max_recommended_working_set_size", free)
    return int(0.9 * min(free, int(working_set)))


def check_gpu_memory(nbytes: int) -> None:
    """Refuse what Metal would end in kIOGPUCommandBufferCallbackErrorOutOfMemory.

    Args:
        nbytes: All that a model will hold.

    Raises:
        FlashError: If it is more than the GPU may use.
    """
    facts = mx.device_info()
    limit = int(facts.get("max_recommended_working_set_size", 0))
    if not limit or nbytes <= limit:
        return
    found = (
        f"{say_memory(nbytes)} of memory are more than the {limit / 1e9:.1f} GB that "
        "the GPU may use"
    )
    machine = int(facts.get("memory_size", psutil.virtual_memory().total))
    if nbytes > machine:
        raise FlashError(
            f"{found} of this machine's {machine / 1e9:.1f} GB. Give less with "
            "--memory; sudo sysctl iogpu.wired_limit_mb=N lets the GPU use N MB."
        )
    raise FlashError(
        f"{found}. Give less with --memory, or allow it until the next start of the "
        f"machine: sudo sysctl iogpu.wired_limit_mb={-(-nbytes // 2**20)}"
    )


def _usage() -> Usage | None:
    """What macOS's kernel counts of this process; None elsewhere or if it fails."""
    if sys.platform != "darwin":
        return None
    usage = Usage()
    failed = _libproc().proc_pid_rusage(
        os.getpid(), RUSAGE_INFO_V4, ctypes.byref(usage)
    )
    return None if failed else usage


@functools.cache
def _libproc() -> Any:
    return ctypes.CDLL(None)  # part of libSystem, which every process has loaded
