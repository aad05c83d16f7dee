"""What the machine has free, and what this process takes of it."""

import resource
import sys
from pathlib import Path

import mlx.core as mx
import psutil


def peak_process_bytes() -> int:
    """The most resident memory this process has had, in bytes."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux hands ru_maxrss on to children, exec or not: it may be the parent's.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def usable_memory_bytes() -> int:
    """What a run may take without harming the machine: nine tenths of what is free.

    On Apple silicon the GPU's recommended working set bounds it as well.
    """
    free = psutil.virtual_memory().available
    working_set = mx.device_info().get("max_recommended_working_set_size", free)
    return int(0.9 * min(free, working_set))
