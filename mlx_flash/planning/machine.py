"""The machine in words, and whether it is a virtual one."""

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

import mlx.core as mx
import psutil


def machine() -> tuple[str, str]:
    """(device, operating system) in words: "Apple M1 Max, 32 GB", "macOS 15.1"."""
    info = mx.device_info()
    name = info.get("device_name") or platform.processor() or platform.machine()
    if sys.platform == "darwin":
        system = f"macOS {platform.mac_ver()[0]}"
    else:
        system = f"{platform.system()} {platform.release()}"
        name = _cpu_name() if mx.default_device() == mx.cpu else name
    total = psutil.virtual_memory().total
    return f"{name}, {os.cpu_count()} cores, {total / 1e9:.0f} GB", system


def _cpu_name() -> str:
    """The processor of a Linux machine, as its kernel names it."""
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.M)
    return found[1].strip() if found else platform.machine()


def is_virtual() -> bool:
    """Whether this is a virtual machine, whose host may cache what its guest cannot."""
    if sys.platform == "darwin":
        value = ctypes.c_int(0)
        length = ctypes.c_size_t(ctypes.sizeof(value))
        ctypes.CDLL(None).sysctlbyname(
            b"kern.hv_vmm_present",
            ctypes.byref(value),
            ctypes.byref(length),
            None,
            ctypes.c_size_t(0),
        )
        return bool(value.value)
    return bool(re.search(r"^flags\s*:.*\bhypervisor\b", _cpuinfo(), re.M))


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
