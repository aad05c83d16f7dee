"""The same weights and the same memory, in several programs, one after the other.

The model is a synthetic OPT, in whose FFNs a tenth of the neurons is predicted; the
other programs compute all of it, as they do with any OPT. Each program runs in a
process of its own while a ballast leaves it only so much memory.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import psutil

from ...errors import FlashError
from ...memory_size import parse_memory
from ...storage.manifest import read_manifest
from ..opt import Shape, checkpoint, flash_folder
from ..process import run_module
from ..report import Column, Report, Row, progress
from . import exports, program
from .ballast import Ballast, limited_memory

PROCESS_BYTES = 700_000_000  # for Python and its libraries, on top of the model's share
PACKAGES = "llama-cpp-python", "accelerate", "transformers", "torch"
COLUMNS = [
    Column("tokens/s", "tokens_per_s", 1, 3),
    Column("ms per token", "total_ms"),
    Column("GB read per token", "bytes_per_token", 1e9, 2),
    Column("peak GB", "memory_bytes", 1e9, 2),
    Column("swap GB", "swap_bytes", 1e9, 2),
    Column("load s", "load_s", 1, 1),
    Column("prompt s", "prompt_s", 1, 1),
    Column("mlx-flash is faster by", "slower", 1, 1),
]


@dataclass(frozen=True)
class Options:
    """`tokens` of programs that read little for each, `slow_tokens` of the others;
    `only` names the kinds of program to run, none for all."""

    memory: str = "50%"
    prompt_tokens: int = 16
    tokens: int = 32
    slow_tokens: int = 4
    ballast: bool = True
    keep: bool = False
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Peer:
    """A program: what it needs installed, and the files it wants of the model."""

    name: str
    kind: str
    package: str
    write: Callable[[Path, Shape], Path]  # (place, shape) → what it loads
    slow: bool = True
    predictor: bool = False
    resident: bool = False


def _checkpoint(place: Path, shape: Shape) -> Path:
    return checkpoint(place / "opt-checkpoint", shape)


def _gguf(place: Path, shape: Shape) -> Path:
    path = place / "gpt2.gguf"
    if not path.exists():
        exports.write_gguf(path, shape)
    return path


def _flash(place: Path, shape: Shape) -> Path:
    return place / "opt-flash"  # written before all others


PEERS = [
    Peer("mlx-flash", "mlx_flash", "mlx", _flash, slow=False, predictor=True),
    Peer("mlx-flash, no predictor", "mlx_flash", "mlx", _flash),
    Peer("llama.cpp, mmap", "llama_cpp", "llama_cpp", _gguf),
    Peer("accelerate, disk offload", "accelerate", "accelerate", _checkpoint),
    Peer("mlx-lm, resident", "mlx_lm", "mlx_lm", _checkpoint, resident=True),
]


def run(place: Path, shape: Shape, options: Options) -> Report:
    """A row for each program; those that are not installed or do not fit say so.

    Args:
        place: Where the model's files are written; all but the flash folder are
            removed as soon as no later program wants them, unless `keep`.
    """
    memory = parse_memory(options.memory)
    if memory is None:
        raise FlashError("Peers need a size that all get. Try --memory 50% or 7GB.")
    flash_folder(place, shape, options.memory)
    model_bytes = read_manifest(place / "opt-flash").model_bytes
    budget = int(memory * model_bytes) if isinstance(memory, float) else memory
    rows: list[Row] = []
    peers = [p for p in PEERS if not options.only or p.kind in options.only]
    for i, peer in enumerate(progress(peers, "measuring", "program")):
        rows.append(_row(peer, place, shape, budget, model_bytes, options))
        later = {other.write for other in peers[i + 1 :]}
        if not options.keep and peer.write not in {*later, _flash}:
            for path in (place / "gpt2.gguf", place / "opt-checkpoint"):
                if peer.write in (_gguf, _checkpoint) and path.exists():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    mine = next((row for row in rows if row.name == "mlx-flash"), None)
    for row in rows:
        if mine and row.total_ms and mine.total_ms:
            row.more["slower"] = row.total_ms / mine.total_ms
    return Report(
        "peers",
        rows,
        COLUMNS,
        _notes(shape, options, budget, model_bytes),
        {
            "prediction": "synthetic",
            "memory_left_bytes": budget + PROCESS_BYTES if options.ballast else None,
            "budget_bytes": budget,
            "model_bytes": model_bytes,
            "shape": vars(shape),
            "packages": {name: _version(name) for name in PACKAGES},
            "repeats": 1,
        },
    )


def _row(
    peer: Peer,
    place: Path,
    shape: Shape,
    budget: int,
    model_bytes: int,
    options: Options,
) -> Row:
    if importlib.util.find_spec(peer.package) is None:
        return Row(peer.name, more={"error": f"{peer.package} is not installed"})
    free = psutil.virtual_memory().available
    if peer.resident and free < model_bytes + PROCESS_BYTES:
        reason = f"{model_bytes / 1e9:.1f} GB do not fit in {free / 1e9:.1f} GB"
        return Row(peer.name, more={"error": reason})
    try:
        path = peer.write(place, shape)
        forget_pages(path)
        job = {
            "path": str(path),
            "budget_bytes": budget,
            "layer_bytes": model_bytes // shape.layers,
            "predictor": peer.predictor,
            "prompt_tokens": options.prompt_tokens,
            "warm_up": 1 if peer.slow else max(options.tokens // 4, 1),
            "tokens": options.slow_tokens if peer.slow else options.tokens,
            "threads": os.cpu_count(),
            "vocab": shape.vocab,
            "dtype": shape.dtype,
            "offload_folder": str(place / "offload"),
        }
        limit = options.ballast and not peer.resident
        left = limited_memory(budget + PROCESS_BYTES) if limit else nullcontext()
        with left as ballast:
            found = run_program(peer.kind, job, ballast)
    except FlashError as error:
        return Row(peer.name, more={"error": str(error)})
    finally:
        shutil.rmtree(place / "offload", ignore_errors=True)
    return _measured(peer.name, found)


def run_program(kind: str, job: dict, ballast: Ballast | None = None) -> dict:
    """Run one program and return its figures; it ends with us in every case.

    Raises:
        FlashError: If it fails, in its own last words, or if the ballast gave way.
    """
    watch = ballast.check if ballast else None
    return run_module(program.__name__, kind, json.dumps(job), watch=watch)


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


def _measured(name: str, found: dict) -> Row:
    ms = [1e3 * s for s in found.pop("seconds")]
    read = found.pop("bytes_read")
    row = Row(name, total_ms=mean(ms), memory_bytes=found.pop("peak_bytes"))
    row.tokens = len(ms)
    row.more = {**found, "tokens_per_s": 1e3 / mean(ms)}
    row.std["total_ms"] = stdev(ms) if len(ms) > 1 else 0.0
    if None not in read:
        row.bytes_per_token = mean(read)
    return row


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _notes(shape: Shape, options: Options, budget: int, model_bytes: int) -> list[str]:
    left = f"{(budget + PROCESS_BYTES) / 1e9:.1f} GB"
    limited = (
        f"a ballast leaves each program {left} of memory, page cache included "
        f"({budget / 1e9:.1f} GB for the model, the rest for Python and libraries)"
        if options.ballast
        else "memory was NOT limited"
    )
    return [
        f"The same {model_bytes / 1e9:.1f} GB of random {shape.dtype} weights: an OPT "
        f"of {shape.layers} layers, width {shape.dims:,}, {shape.units:,} neurons; "
        f"{os.cpu_count()} threads; {limited}.",
        "llama.cpp has no OPT and runs it as a GPT-2, whose sizes are the same (GELU "
        "for ReLU). mlx-flash computes the neurons its predictor names, here a "
        "SYNTHETIC tenth; the row without predictor and all others compute every one.",
        f"{options.prompt_tokens} prompt tokens; warm-up tokens are not counted; ± is "
        "the deviation over tokens. Bytes are what the system says the process had "
        "read from disk. Peak is resident memory of the process, mapped files "
        "included. Pages of the files were dropped before each program started.",
    ]
