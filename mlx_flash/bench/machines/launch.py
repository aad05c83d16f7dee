"""Start the ranks of one run on this machine, and leave none behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ...errors import FlashError
from ...machines import LAUNCHED
from ..process import QUIET

PACKAGE = Path(__file__).parents[3]  # where Python finds mlx_flash
RANK = "mlx_flash.bench.machines.rank"
FIRST_PORT = 20000
# What a rank says that saw another one go: not why that one went.
FOLLOWS = "All ranks stop."
COLOURS = re.compile(r"\x1b\[\d+m")


def launch(ranks: int, job: dict, limit_s: int, module: str = RANK) -> dict:
    """What rank 0 writes of a run with so many ranks.

    Args:
        ranks: 1 is a process of its own without mlx.launch.
        job: What `module`, run by each rank, gets as JSON.
        limit_s: Seconds after which the run is ended.

    Raises:
        FlashError: If a rank fails, in its own words, or none ends in time.
    """
    with tempfile.TemporaryDirectory(prefix="mlx-flash-ranks-") as work:
        result = Path(work) / "result.json"
        told = json.dumps(job | {"result": str(result), "limit_s": limit_s})
        command = [*_launcher(ranks), sys.executable, "-m", module, told]
        said = _run(command, Path(work) / "said", limit_s)
        if not result.exists():
            raise FlashError(said or f"None of {ranks} ranks wrote a result.")
        return json.loads(result.read_text())


def _launcher(ranks: int) -> list[str]:
    """What a command is started with, to be run by so many ranks."""
    if ranks == 1:
        return []
    beside = Path(sys.executable).with_name("mlx.launch")
    program = str(beside) if beside.exists() else shutil.which("mlx.launch")
    if program is None:
        raise FlashError(
            f"mlx.launch is not beside {sys.executable}. Install MLX again: pip "
            "install --force-reinstall mlx"
        )
    ports = ["--starting-port", str(free_ports(ranks))]
    return [program, "-n", str(ranks), "--backend", "ring", *ports, "--"]


def free_ports(count: int) -> int:
    """The first of so many ports side by side that nobody listens at.

    Others may run ranks on this machine too, at the port that mlx.launch begins with.
    """
    begin = FIRST_PORT + os.getpid() % 8000
    for first in range(begin, begin + 4000, count):
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise FlashError(f"No {count} ports side by side are free on this machine.")


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _run(command: Sequence[str], output: Path, limit_s: int) -> str:
    """Run a command to its end or the limit, and end all of its processes.

    Returns:
        Why it failed, as far as its output says so.
    """
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
    # mlx.launch leaves files behind: they go with the output's folder.
    environment |= {"PYTHONPATH": str(PACKAGE), "TMPDIR": str(output.parent), **QUIET}
    # mlx.launch spins where its input has ended.
    reads, writes = os.pipe()
    try:
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdin=reads,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        try:
            _wait(process, writes, limit_s)
        finally:
            _end(process)
    finally:
        os.close(reads)
        os.close(writes)
    return _reason(output.read_text(errors="replace"), process.returncode)


def _wait(process: subprocess.Popen, writes: int, limit_s: int) -> None:
    """Wait for a command, at most to the limit.

    mlx.launch also spins as long as it could write to a rank's input: it takes a core
    from the ranks. Ranks have closed theirs, which it only sees when it writes, so it
    is given something to write.

    Args:
        writes: Where its input comes from.

    Raises:
        FlashError: If it takes longer.
    """
    end_s = time.monotonic() + limit_s
    while process.poll() is None:
        if time.monotonic() > end_s:
            raise FlashError(
                f"did not end in {limit_s} s, and was stopped. Give a larger "
                "--limit-s, or fewer --tokens."
            )
        os.write(writes, b"\n")
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            pass


def _end(process: subprocess.Popen) -> None:
    """Kill the process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # nothing of the group is left
    process.wait()


def _reason(output: str, code: int) -> str:
    """The line of all ranks' output that says best why they failed."""
    lines = [COLOURS.sub("", line).strip() for line in output.splitlines()]
    lines = [line for line in lines if line]
    errors = [x.removeprefix("Error: ") for x in lines if x.startswith("Error: ")]
    causes = [x for x in errors if FOLLOWS not in x]
    for found in (causes, errors):
        if found:
            return found[0]
    return lines[-1] if lines else f"exit {code}"
