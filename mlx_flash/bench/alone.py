"""What a process of its own holds while it generates or converts.

`generate` and `convert` start this module again as a process; growth is what the
memory of that process rises, at its peak, above what Python and the libraries
take once they are imported.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..converters.convert import convert as convert_here
from ..memory.system import peak_process_bytes, process_bytes
from .decode import run_model
from .process import print_result, run_module
from .report import Row


class Watch(threading.Thread):
    """The memory of this process, fifty times a second, and its peak."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.sizes: list[int] = []  # after each token
        self.peak = 0
        self.stopped = threading.Event()

    def now(self) -> int:
        size = process_bytes()
        self.peak = max(self.peak, size)
        return size

    def note(self) -> None:
        self.sizes.append(self.now())

    def run(self) -> None:
        while not self.stopped.wait(0.02):
            self.now()


def slope(sizes: list[int]) -> float | None:
    """Bytes per token over the second half, where slots and KV cache are in place."""
    late = sizes[len(sizes) // 2 :]
    if len(late) < 8:
        return None
    return float(np.polyfit(np.arange(len(late)), late, 1)[0])


def generate(name: str, folder: Path, memory: str, **options) -> Row:
    """A row of a run of `run_model` in a fresh process.

    Raises:
        FlashError: As that process ended, with a refused budget for example.
    """
    job = {"folder": str(folder), "memory": memory, **options}
    facts = run_module(__name__, "generate", json.dumps(job))
    slot_share = facts["slots"] / facts["units"]
    return Row.from_json(facts | {"name": name, "slot_share": slot_share})


def convert(source: Path, target: Path, **options) -> dict:
    """Convert in a fresh process: its seconds, peak memory and largest layer.

    Raises:
        FlashError: If it fails.
    """
    job = {"src": str(source), "dst": str(target), **options}
    return run_module(__name__, "convert", json.dumps(job))


def _generate(job: dict) -> dict:
    mx.eval(mx.zeros((64, 64)) @ mx.zeros((64, 64)))  # part of the baseline
    watch = Watch()
    baseline = watch.now()
    watch.start()
    run = run_model(**job, prepare=lambda model: watch.note)
    watch.stopped.set()
    row = run.row(
        "",
        baseline_bytes=baseline,
        peak_bytes=watch.peak,
        growth_bytes=watch.peak - baseline,
        growth_per_token=slope(watch.sizes),
    )
    return row.to_json()


def _convert(job: dict) -> dict:
    begin = time.perf_counter()
    target = convert_here(**job)
    return {
        "seconds": time.perf_counter() - begin,
        "peak_bytes": peak_process_bytes(),
        "layer_bytes": max(f.stat().st_size for f in (target / "ffn").iterdir()),
    }


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    work = {"generate": _generate, "convert": _convert}[sys.argv[1]]
    print_result(lambda: work(json.loads(sys.argv[2])))
