"""What a process of its own holds while it generates or converts.

Growth is what the memory of that process rises, at its peak, above what Python and the
libraries take once they are imported.
"""

import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..converters.convert import convert as convert_here
from ..memory.system import peak_process_bytes, process_bytes
from .decode import run_model
from .process import call_apart
from .report import Row


def slope(sizes: list[int]) -> float | None:
    """Bytes per token over the second half, where slots and KV cache are in place."""
    late = sizes[len(sizes) // 2 :]
    if len(late) < 8:
        return None
    return float(np.polyfit(np.arange(len(late)), late, 1)[0])


def generate(name: str, folder: Path, memory: str, **options) -> Row:
    """The row of a run of `run_model` in a fresh process.

    Raises:
        FlashError: As that process ended, with a refused budget for example.
    """
    found = call_apart(
        _generate, name=name, folder=str(folder), memory=memory, **options
    )
    return Row.from_json(found)


def convert(source: Path, target: Path, **options) -> dict:
    """Convert in a fresh process: its seconds, peak memory and largest layer.

    Raises:
        FlashError: If it fails.
    """
    return call_apart(_convert, src=str(source), dst=str(target), **options)


def _generate(**options) -> dict:
    mx.eval(mx.zeros((64, 64)) @ mx.zeros((64, 64)))  # part of the baseline
    baseline = process_bytes()
    sizes: list[int] = []  # before each token

    def note() -> None:
        sizes.append(process_bytes())

    row = run_model(**options, prepare=lambda model: note)
    peak = peak_process_bytes()
    row.more |= {
        "baseline_bytes": baseline,
        "peak_bytes": peak,
        "growth_bytes": peak - baseline,
        "growth_per_token": slope(sizes),
    }
    return row.to_json()


def _convert(**options) -> dict:
    begin = time.perf_counter()
    target = convert_here(**options)
    return {
        "seconds": time.perf_counter() - begin,
        "peak_bytes": peak_process_bytes(),
        "layer_bytes": max(f.stat().st_size for f in (target / "ffn").iterdir()),
    }
