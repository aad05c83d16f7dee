"""How short of memory the machine is, as its kernel tells.

macOS has levels of pressure. Linux has pressure stall information (the share of time
that somebody waited for memory), and cgroups that may allow less than the machine has.
"""

import ctypes
import sys
from pathlib import Path

import psutil

NORMAL = 1  # of macOS's kern.memorystatus_vm_pressure_level; then come 2 and 4
STALLED_PERCENT = 10.0  # of the last ten seconds, in which somebody waited for memory
CGROUPS = Path("/sys/fs/cgroup")
# Files of the limit and of the usage, and the statistic of what can be pushed out.
VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
VERSION_2 = "memory.max", "memory.current", "inactive_file"


def machine_bytes() -> int:
    """The memory of the machine, or what a cgroup allows of it."""
    limits = [_number(folder / limit) for folder, limit, *_ in _cgroups()]
    return min([psutil.virtual_memory().total, *filter(None, limits)])


def available_bytes() -> int:
    """Memory that programs could have now without pushing anything out.

    What a cgroup leaves to this process, where that is less than the machine has.
    """
    free = psutil.virtual_memory().available
    left = [free]
    for folder, limit, usage, inactive in _cgroups():
        room = _number(folder / limit)
        used = _number(folder / usage)
        if room is not None and used is not None:
            left.append(room - used + _statistic(folder / "memory.stat", inactive))
    return max(min(left), 0)


def is_short() -> bool:
    """Whether the kernel says that memory is short."""
    if sys.platform == "darwin":
        return _darwin_level() > NORMAL
    try:
        some = Path("/proc/pressure/memory").read_text().split()
    except OSError:  # a kernel without it
        return False
    averages = dict(word.split("=") for word in some[1:3])
    return float(averages.get("avg10", 0)) >= STALLED_PERCENT


def _darwin_level() -> int:
    level = ctypes.c_int(NORMAL)
    size = ctypes.c_size_t(ctypes.sizeof(level))
    name = b"kern.memorystatus_vm_pressure_level"
    found = ctypes.byref(level), ctypes.byref(size)
    ctypes.CDLL(None).sysctlbyname(name, *found, None, ctypes.c_size_t(0))
    return level.value


def _cgroups() -> list[tuple[Path, str, str, str]]:
    """(folder, names of the limit, of the usage, of what can be pushed out)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names = VERSION_2
            root = CGROUPS
        elif "memory" in controllers.split(","):
            names = VERSION_1
            root = CGROUPS / "memory"
        else:
            continue
        # A container sees its own cgroup as the root, whatever the path says.
        found += [(root / path.strip("/"), *names), (root, *names)]
    return found


def _number(path: Path) -> int | None:
    """None where there is no such file, or no limit in it."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith(f"{name} ")]
    return int(found[0]) if found else 0
