"""Processes whose reads fail, end early, are interrupted, delayed or held.

`run_on_faulty_disk` starts one. Inside of it a `Disk` says what reads meet from now on.
"""

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_interruptions import KINDS, make_folder

HERE = Path(__file__).parent
FAULTS = "failed", "interrupted", "short", "ended", "delayed"
linux = pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")


class Disk:
    """The faults of this process, which has `faulty_disk.c` in front of its reads."""

    def __init__(self):
        self._shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._shim.faults_counted.restype = ctypes.c_long
        self._shim.reads_waiting.restype = ctypes.c_long

    @contextlib.contextmanager
    def faults(self, **per_1000):
        """Of 1,000 reads inside of the block so many meet each fault."""
        rates = [per_1000.get(name, 0) for name in FAULTS]
        self._shim.set_faults((ctypes.c_int * len(FAULTS))(*rates))
        try:
            yield
        finally:
            self._shim.set_faults((ctypes.c_int * len(FAULTS))())

    def counted(self):
        return {name: self._shim.faults_counted(i) for i, name in enumerate(FAULTS)}

    @contextlib.contextmanager
    def during_the_next_read(self, change):
        """Calls `change()` between the beginning of a read and its first byte."""
        ended = threading.Event()

        def work():
            while not self._shim.reads_waiting() and not ended.is_set():
                time.sleep(0.001)
            change()
            self._shim.hold_reads(0)

        self._shim.hold_reads(1)
        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def make_folders(base):
    """{name of a kind: folder of a tiny model of it}"""
    folders = {}
    for name in KINDS:
        folder = base / name.replace(" ", "-")
        folder.mkdir()
        folders[name] = str(make_folder(name, folder))
    return folders


def run_on_faulty_disk(base, module, limit_s=3600, seed=1, **arguments):
    """`module.trials(**arguments)` in a process with a faulty disk.

    Args:
        base: A folder, for the compiled shim.
        module: Of this folder; `trials` returns what json can say.
    """
    if not (compiler := shutil.which("cc")):
        pytest.skip("needs a C compiler, to put faults in front of reads")
    shim = base / "faulty_disk.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-pthread"]
    subprocess.run([*command, HERE / "faulty_disk.c", "-o", shim], check=True)
    script = (
        f"import json, sys; sys.path[:0] = {[str(HERE), str(HERE.parent)]!r}; "
        f"import {module}; print(json.dumps({module}.trials(**json.load(sys.stdin))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(arguments | {"seed": seed}),
        env={**os.environ, "LD_PRELOAD": str(shim), "FAULT_SEED": str(seed)},
        capture_output=True,
        text=True,
        timeout=limit_s,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])
