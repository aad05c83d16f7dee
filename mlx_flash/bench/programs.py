"""Start the programs of the comparison, each in a process that ends with ours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from ..errors import FlashError
from .ballast import Ballast

WATCH_S = 2.0  # between looks at the ballast


def run_program(kind: str, job: dict, ballast: Ballast | None = None) -> dict:
    """Run one program and return its line of JSON; it ends with us in every case.

    Raises:
        FlashError: If it fails, in its own last words, or if the ballast gave way.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.peer", kind, json.dumps(job)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"},
    )
    try:
        while True:
            try:
                out, error = process.communicate(timeout=WATCH_S)
                break
            except subprocess.TimeoutExpired:
                if ballast:
                    ballast.check()
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    if process.returncode == -signal.SIGKILL:
        raise FlashError("was killed: out of memory")
    if process.returncode:
        lines = error.strip().splitlines() or [f"exit {process.returncode}"]
        raise FlashError(lines[-1])
    return json.loads(out.splitlines()[-1])


def forget_pages(path: Path) -> None:
    """Drop a file's pages from the page cache, where the system takes that advice."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in [path] if path.is_file() else path.rglob("*.safetensors"):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)  # pages not yet written would stay
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
