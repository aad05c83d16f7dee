"""Run a module of this package in a process of its own, which ends with ours."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

from ..errors import FlashError

WATCH_S = 2.0  # between calls of `watch`


def run_module(
    module: str, *arguments: str, watch: Callable[[], None] | None = None
) -> dict:
    """Run `python -m module …` and return its last line, which is JSON.

    Args:
        watch: Called while it runs; what it raises ends the process.

    Raises:
        FlashError: If the process fails, in its own last words.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
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
                if watch:
                    watch()
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


def print_result(work: Callable[[], dict]) -> None:
    """What the module does: print a line of JSON, or end with a FlashError's text."""
    try:
        print(json.dumps(work()))
    except FlashError as error:
        sys.exit(str(error))
