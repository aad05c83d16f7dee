"""Run a script on several ranks of this machine, as `mlx.launch` does."""

import os
import random
import socket
import subprocess
import sys
import weakref
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def free_port(count: int) -> int:
    """The first of some ports in a row that nobody listens at."""
    for _ in range(100):
        first = random.randrange(20_000, 60_000)
        try:
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports")


def python_path() -> dict[str, str]:
    """The environment with which a script finds this package and these tests."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def start(ranks: int, script: Path, *words: object, **environment: str):
    """The process of mlx.launch, with all ranks in its process group."""
    launch = Path(sys.executable).parent / "mlx.launch"
    variables = python_path() | environment
    command = [launch, "-n", ranks, "--backend", "ring"]
    command += ["--starting-port", free_port(ranks), "--python", sys.executable]
    for name, value in variables.items():
        command += ["--env", f"{name}={value}"]
    # mlx.launch keeps a core busy where its input has ended: this one stays open.
    reads, writes = os.pipe()
    process = subprocess.Popen(
        [str(word) for word in (*command, "--", script, *words)],
        stdin=reads,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    os.close(reads)
    weakref.finalize(process, os.close, writes)
    return process


def launch(ranks: int, script: Path, *words: object, timeout_s: float = 300, **env):
    """What the ranks printed, together."""
    process = start(ranks, script, *words, **env)
    try:
        return process.communicate(timeout=timeout_s)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise AssertionError(process.communicate()[0]) from None


def run_alone(script: Path, *words: object) -> str:
    """What one process printed, without a launcher."""
    done = subprocess.run(
        [sys.executable, script, *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | python_path(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
