"""How fast reader and slot cache bring FFN neurons, beside what the disk can do.

Bundles of a synthetic OPT come through the engine's reader and slots; nothing is
multiplied. Which neurons a token selects is SYNTHETIC (`selections.py`). Between the
blocks of tokens fio reads the same files, in reads as long as a bundle and with as many
threads.
"""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import click

from ..errors import FlashError
from ..loading import READ_THREADS
from ..memory.policies import Lru, Window
from ..memory.stats import Stats
from ..storage.limits import PAGE_BYTES
from ..storage.reader import open_reader
from . import methods
from .methods import Bench, Player
from .options import VOCABULARY, Count, Folder, Share, make_shape, model_or_opt
from .report import Column, Report, Row, cache_state, progress

COLUMNS = [
    Column("resident %", "resident_share", 0.01, 1),
    Column("read anew %", "missing_share", 0.01, 2),
    Column("MB per token", "bytes_per_token", 1e6, 1),
    Column("reads per token", "reads_per_token"),
    Column("KiB per read", "bytes_per_read", 1024, 2),
    Column("reads/s", "reads_per_s"),
    Column("GB/s in flight", "gb_per_s", 1, 2),
    Column("fio GB/s", "fio_gb_per_s", 1, 2),
    Column("of fio", "of_fio", 1, 2),
    Column("I/O ms", "io_ms"),
    Column("cache ms", "cache_ms", 1, 2),
    Column("median", "median_cache_ms", 1, 2),
]


def run(
    layers: Count = 32,
    units: Annotated[Count, "Neurons of a layer."] = 16384,
    dims: Annotated[Count, "Model width."] = 4096,
    reader: Annotated[str, click.Choice(["c", "python", "both"])] = "both",
    window: Annotated[tuple[int, ...], click.INT, "Add a row: window policy."] = (),
    tokens: Annotated[Count, "Measured, per row."] = 96,
    rounds: Annotated[Count, "Blocks of those tokens."] = 4,
    warm_up: Annotated[Count, "Tokens before them."] = 24,
    selected: Annotated[Share, "Share, per token."] = 0.10,
    resident: Annotated[Share, "Share in slots."] = 0.24,
    missing: Annotated[Share, "Share read, LRU."] = 0.024,
    fio_seconds: Annotated[float, "0 leaves it out."] = 4.0,
    folder: Folder = None,
) -> Report:
    """Reader and slot cache on OPT-6.7B's bundles, beside fio.

    \b
    Examples:
      mlx-flash bench reader --window 4
      mlx-flash bench reader --layers 4 --units 2048 --dims 512 --fio-seconds 0
    """
    options = methods.Options(
        tokens=tokens,
        rounds=rounds,
        warm_up=warm_up,
        selected=selected,
        resident=resident,
        missing=missing,
    )
    shape = make_shape(layers, dims, units, VOCABULARY, "float16")
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(model_or_opt(None, folder, shape))
        bench = Bench(path, options, Lru())
        stack.enter_context(bench.reader)
        players = []
        for name, policy, native in _wanted(reader, window):
            own = stack.enter_context(open_reader(READ_THREADS, native=native))
            players.append(bench.windowed(name, policy, reader=own))
        with_fio = fio_seconds > 0 and shutil.which("fio") is not None
        files = [bench.file(layer) for layer in bench.layers]
        block = bench.layers[0].unit_bytes
        methods.warm_up(players, warm_up)
        blocks: dict[str, list[Stats]] = {player.name: [] for player in players}
        disk: dict[str, list[float]] = {player.name: [] for player in players}
        around = fio(files, block, fio_seconds) if with_fio else 0.0
        for _ in progress(range(rounds), "measuring", "round"):
            for player in players:
                before = player.stats.copy()
                player.play(player.tokens)
                blocks[player.name].append(player.stats - before)
                if with_fio:
                    after = fio(files, block, fio_seconds)
                    disk[player.name].append((around + after) / 2)
                    around = after
        direct = bench.reader.direct and block % PAGE_BYTES == 0
    rows = [_row(p, layers * units, blocks[p.name], disk[p.name]) for p in players]
    return Report(
        "reader",
        rows,
        COLUMNS,
        _notes(bench, direct, fio_seconds if with_fio else None),
        {"trace": "synthetic", "noise": bench.noise},
    )


def _wanted(reader: str, windows: Sequence[int]) -> list[tuple[str, Lru, bool]]:
    """(name, policy, whether the C reader) of each row."""
    readers = {"c": [True], "python": [False], "both": [True, False]}[reader]
    policies = [("LRU", Lru(), native) for native in readers]
    policies += [(f"window {k}", Window(k), readers[0]) for k in windows]
    return [
        (f"{name}, {'C' if native else 'Python'} reader", policy, native)
        for name, policy, native in policies
    ]


def _row(player: Player, units: int, blocks: list[Stats], disk: list[float]) -> Row:
    row = player.row(units=units)
    held = sum(int((slots.cache.slot_of >= 0).sum()) for slots in player.layers)
    row.more["resident_share"] = held / units
    speeds = [block.read_gb_per_s or 0.0 for block in blocks]
    row.note_spread("gb_per_s", speeds)
    if disk:
        row.note_spread("fio_gb_per_s", disk)
        ratios = [own / theirs for own, theirs in zip(speeds, disk, strict=True)]
        row.note_spread("of_fio", ratios)
    return row


def fio(files: Sequence[Path], block_bytes: int, seconds: float) -> float:
    """GB/s of random direct reads spread over `files`."""
    command = ["fio", "--name=bundles", "--filename=" + ":".join(map(str, files))]
    command += ["--rw=randread", f"--bs={block_bytes}", "--direct=1", "--readonly"]
    command += ["--ioengine=psync", "--thread", f"--numjobs={READ_THREADS}"]
    command += ["--group_reporting", "--norandommap", "--randrepeat=0"]
    command += ["--time_based", f"--runtime={seconds}", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise FlashError(f"fio failed: {done.stderr.strip() or done.stdout.strip()}")
    return json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"] / 1e9


def _notes(bench: Bench, direct: bool, fio_seconds: float | None) -> list[str]:
    o, first = bench.options, bench.layers[0]
    beside = (
        "fio is not installed, or was left out: nothing to compare the reader with"
        if fio_seconds is None
        else f"before and after each {READ_THREADS} threads of fio, {fio_seconds:g} s"
    )
    return [
        f"SYNTHETIC selections (noise {bench.noise:.3f}) over {len(bench.layers)} "
        f"layers of {first.units:,} neurons, {bench.manifest.ffn_bytes / 1e9:.2f} GB "
        f"of {bench.manifest.dtype} in bundles of {first.unit_bytes / 1024:g} KiB; "
        f"{bench.slots:,} slots a layer, {o.selected:.1%} of it selected per token.",
        f"{o.rounds} rounds of {bench.sparse_tokens} tokens for each row, {o.warm_up} "
        f"to warm up; {beside}. ± is the deviation over tokens, of GB/s and ratios "
        f"over rounds. {cache_state(direct)}.",
    ]
