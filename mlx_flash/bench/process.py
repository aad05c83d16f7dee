"""Call functions of this package in a process of its own, which ends with ours."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from ..errors import FlashError

WATCH_S = 2.0  # between calls of `watch`
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
}


def call_apart(
    function: Callable[..., dict], *, watch: Callable[[], None] | None = None, **job
) -> dict:
    """What `function(**job)` returns in a process of its own.

    Args:
        function: Of a module of this package.
        watch: Called while it runs; what it raises ends the process.
        job: What JSON can hold, as has to be what the function returns.

    Raises:
        FlashError: If the process fails, in its own last words.
    """
    names = function.__module__, function.__name__
    return run_command(
        [sys.executable, "-m", __name__, *names, json.dumps(job)], watch=watch
    )


def run_command(
    command: Sequence[str],
    *,
    watch: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict:
    """The JSON in the last line that a command prints; it ends with us in every case.

    Args:
        watch: Called while it runs; what it raises ends the process.
        environment: Beside ours.

    Raises:
        FlashError: If the command fails, in its own last words.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | QUIET | dict(environment or {}),
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


if __name__ == "__main__":
    module, name, job_text = sys.argv[1:]
    try:
        found = getattr(importlib.import_module(module), name)(**json.loads(job_text))
        print(json.dumps(found))
    except FlashError as error:
        sys.exit(str(error))
