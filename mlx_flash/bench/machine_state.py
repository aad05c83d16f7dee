"""The machine while it is measured: power source, temperature, swap, load.

A laptop on its battery, a hot one and one that swaps are slower; figures without this
cannot be compared.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import psutil


def machine_state() -> dict:
    """What the system tells now; None where it does not tell.

    Returns:
        "power" ("mains" or "battery, 81 %"), "thermal" (in words), "swap_used_bytes",
        "swapped_in_bytes" and "swapped_out_bytes" since the system started,
        "free_bytes" of memory, "load_average".
    """
    swap = psutil.swap_memory()
    return {
        "power": _power(),
        "thermal": _thermal(),
        "swap_used_bytes": swap.used,
        "swapped_in_bytes": swap.sin,
        "swapped_out_bytes": swap.sout,
        "free_bytes": psutil.virtual_memory().available,
        "load_average": os.getloadavg(),
    }


def say_state(before: dict, after: dict) -> str:
    """One sentence on the machine while something ran, for a table's notes."""
    parts = [f"power: {after['power'] or 'not told by the system'}"]
    parts.append(f"thermal: {after['thermal'] or 'not told by the system'}")
    grown = after["swap_used_bytes"] - before["swap_used_bytes"]
    parts.append(f"swap grew by {max(grown, 0) / 1e6:,.0f} MB")
    load = before["load_average"][0]
    parts.append(f"load {load:.1f} before on {os.cpu_count()} cores")
    return "; ".join(parts) + "."


def _power() -> str | None:
    battery = getattr(psutil, "sensors_battery", lambda: None)()
    if battery is None:
        return None  # no battery: a desktop, or a system that does not tell
    if battery.power_plugged:
        return "mains"
    return f"battery, {battery.percent:.0f} %"


def _thermal() -> str | None:
    if sys.platform == "darwin":
        return parse_pmset(_output("pmset", "-g", "therm"))
    sensors: dict = getattr(psutil, "sensors_temperatures", dict)()
    degrees = [entry.current for entries in sensors.values() for entry in entries]
    return f"{max(degrees):.0f} °C at most" if degrees else None


def parse_pmset(text: str) -> str | None:
    """What macOS says of `pmset -g therm`: the CPU's speed limit in percent, if any.

    An Apple silicon Mac that was never throttled says "No thermal warning level has
    been recorded".
    """
    if limit := re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", text):
        return f"CPU speed limit {limit[1]} %"
    if "No thermal warning level" in text:
        return "no warning"
    if level := re.search(r"thermal warning level set to (\d+)", text, re.I):
        return f"warning level {level[1]}"
    return None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
