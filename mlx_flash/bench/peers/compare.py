"""The same weights and the same memory, in several programs, one after the other.

The model is a synthetic OPT, in whose FFNs a tenth of the neurons is predicted; the
other programs compute all of it, as they do with any OPT. Each program runs in a
process of its own while a ballast leaves it only so much memory.
"""

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import click
import psutil

from ...errors import FlashError
from ...memory_size import parse_memory
from ...storage.direct_io import drop_cached
from ...storage.manifest_reading import read_manifest
from .. import options
from ..opt import Shape, checkpoint, flash_folder
from ..process import call_apart
from ..report import Column, Report, Row, progress
from . import exports, program
from .ballast import limited_memory

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


# What programs load, and how that is written; mlx-flash's own is there before others.
FLASH, GGUF, CHECKPOINT = "opt-flash", "gpt2.gguf", "opt-checkpoint"
WRITERS = {GGUF: exports.write_gguf, CHECKPOINT: checkpoint}


@dataclass(frozen=True)
class Peer:
    """A program: what it needs installed, and the file it wants of the model."""

    name: str
    kind: str
    package: str
    file: str
    slow: bool = True
    predictor: bool = False
    resident: bool = False


PEERS = [
    Peer("mlx-flash", "mlx_flash", "mlx", FLASH, slow=False, predictor=True),
    Peer("mlx-flash, no predictor", "mlx_flash", "mlx", FLASH),
    Peer("llama.cpp, mmap", "llama_cpp", "llama_cpp", GGUF),
    Peer("accelerate, disk offload", "accelerate", "accelerate", CHECKPOINT),
    Peer("mlx-lm, resident", "mlx_lm", "mlx_lm", CHECKPOINT, resident=True),
]


def run(
    shape: options.OptShape = options.OPT_6_7B,
    vocab: options.OptVocab = options.OPT_VOCAB,
    dtype: options.OptDtype = "float32",
    folder: options.Folder = None,
    memory: options.Memory = "50%",
    prompt_tokens: options.Count = 16,
    tokens: options.Count = 32,
    slow_tokens: Annotated[
        options.Count, "Of programs that read gigabytes for each."
    ] = 4,
    ballast: Annotated[bool, "Limit memory.  [default]"] = True,
    keep: Annotated[bool, "Keep every file, with --folder."] = False,
    only: Annotated[
        tuple[str, ...],
        click.Choice(list(program.KINDS)),
        "Run this program; repeat it for more.  [default: all]",
    ] = (),
) -> Report:
    """mlx-flash beside mlx-lm, llama.cpp and accelerate, with the same memory.

    All run the same random weights, one program after the other, in what memory a
    ballast leaves free. Programs that are not installed are left out. Engines for
    models larger than memory are compared by peers-moe and peers-dense.

    \b
    Examples:
      mlx-flash bench peers --json peers.json
      mlx-flash bench peers --shape 16x2048x8192 --memory 50% --tokens 16
    """
    share = parse_memory(memory)
    if share is None:
        raise FlashError("Peers need a size that all get. Try --memory 50% or 7GB.")
    opt = options.parse_shape(shape, vocab, dtype)
    rows: list[Row] = []
    with options.scratch(folder) as place:
        model_bytes = read_manifest(flash_folder(place, opt, memory)).model_bytes
        budget = int(share * model_bytes) if isinstance(share, float) else share
        job = {
            "budget_bytes": budget,
            "layer_bytes": model_bytes // opt.layers,
            "prompt_tokens": prompt_tokens,
            "threads": os.cpu_count(),
            "vocab": vocab,
            "dtype": dtype,
            "offload_folder": str(place / "offload"),
        }
        peers = [p for p in PEERS if not only or p.kind in only]
        for i, peer in enumerate(progress(peers, "measuring", "program")):
            job["predictor"] = peer.predictor
            job["warm_up"] = 1 if peer.slow else max(tokens // 4, 1)
            job["tokens"] = slow_tokens if peer.slow else tokens
            try:
                rows.append(_measure(peer, place, opt, job, model_bytes, ballast))
            except FlashError as error:
                rows.append(Row.failed(peer.name, error))
            # Disks are small: a file goes as soon as no later program wants it.
            if not keep and peer.file not in {FLASH, *(p.file for p in peers[i + 1 :])}:
                _remove(place / peer.file)
            _remove(place / "offload")
    mine = next((row for row in rows if row.name == "mlx-flash"), None)
    for row in rows:
        if mine and row.total_ms and mine.total_ms:
            row.more["slower"] = row.total_ms / mine.total_ms
    limited = (
        f"a ballast leaves each program {(budget + PROCESS_BYTES) / 1e9:.1f} GB of "
        f"memory, page cache included ({budget / 1e9:.1f} GB for the model, the rest "
        "for Python and libraries)"
        if ballast
        else "memory was NOT limited"
    )
    notes = [
        f"The same {model_bytes / 1e9:.1f} GB of random {dtype} weights: an OPT of "
        f"{opt.layers} layers, width {opt.dims:,}, {opt.units:,} neurons; "
        f"{os.cpu_count()} threads; {limited}.",
        "llama.cpp has no OPT and runs it as a GPT-2, whose sizes are the same (GELU "
        "for ReLU). mlx-flash computes the neurons its predictor names, here a "
        "SYNTHETIC tenth; the row without predictor and all others compute every one.",
        f"{prompt_tokens} prompt tokens; warm-up tokens are not counted; ± is "
        "the deviation over tokens. Bytes are what the system says the process had "
        "read from disk. Peak is resident memory of the process, mapped files "
        "included. Pages of the files were dropped before each program started.",
    ]
    facts = {
        "prediction": "synthetic",
        "memory_left_bytes": budget + PROCESS_BYTES if ballast else None,
        "budget_bytes": budget,
        "model_bytes": model_bytes,
        "shape": vars(opt),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    return Report("peers", rows, COLUMNS, notes, facts)


def _measure(
    peer: Peer, place: Path, shape: Shape, job: dict, model_bytes: int, ballast: bool
) -> Row:
    if importlib.util.find_spec(peer.package) is None:
        raise FlashError(f"{peer.package} is not installed")
    free = psutil.virtual_memory().available
    if peer.resident and free < model_bytes + PROCESS_BYTES:
        raise FlashError(
            f"{model_bytes / 1e9:.1f} GB do not fit in {free / 1e9:.1f} GB"
        )
    path = place / peer.file
    if not path.exists():
        WRITERS[peer.file](path, shape)
    forget_pages(path)
    limited = ballast and not peer.resident
    left_bytes = job["budget_bytes"] + PROCESS_BYTES
    with limited_memory(left_bytes) if limited else nullcontext() as check:
        found = run_program(peer.kind, job | {"path": str(path)}, check)
    ms = [1e3 * s for s in found.pop("seconds")]
    read = found.pop("bytes_read")
    return Row(
        peer.name,
        total_ms=mean(ms),
        bytes_per_token=None if None in read else mean(read),
        memory_bytes=found.pop("peak_bytes"),
        tokens=len(ms),
        std={"total_ms": stdev(ms) if len(ms) > 1 else 0.0},
        more={**found, "tokens_per_s": 1e3 / mean(ms)},
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def run_program(kind: str, job: dict, watch: Callable[[], None] | None = None) -> dict:
    """Run one program and return its figures; it ends with us in every case.

    Args:
        watch: Called while it runs; what it raises ends the program.
    """
    return call_apart(program.run, kind=kind, job=job, watch=watch)


def forget_pages(path: Path) -> None:
    """Drop a file's pages from the page cache, where the system takes that advice."""
    for file in [path] if path.is_file() else path.rglob("*.safetensors"):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())  # pages not yet written would stay
        drop_cached(file)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
