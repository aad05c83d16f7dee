"""One run of one engine: import, load, prompt, decode."""

import time

from .engines import ENGINES
from .script import Job, Script, memory_kib, peaks


def run(job: Job) -> dict:
    """Import, load, prompt, decode: what each took, and what the process held."""
    engine = ENGINES[job["engine"]]
    script = Script(job)
    baseline = start(engine.__name__)
    begin = time.perf_counter()
    go = engine(job, script)
    load_s = time.perf_counter() - begin
    script.mark()
    found = go()
    return found | {
        "load_s": load_s,
        "marks": script.marks[: script.steps + 1],
        "best": script.best[: script.steps],
        **peaks(baseline, script.held_bytes),
    }


def start(name: str) -> int | None:
    """Import what the engine multiplies with; resident KiB from then on are its own."""
    if name == "neurostream":
        import neurostream  # noqa: F401
        import torch

        torch.ones(64, 64) @ torch.ones(64, 64)
    else:
        __import__(name if name != "bigrig" else "bigrig_engine.session")
        import mlx.core as mx
        import mlx_lm  # noqa: F401

        mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))
        mx.reset_peak_memory()
    return memory_kib("VmRSS")
