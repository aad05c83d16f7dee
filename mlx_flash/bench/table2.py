"""The paper's Table 2: what each part of the method saves of a token's I/O.

One reader and one set of files serve all rows; the rows differ in what is switched on.
Nothing is multiplied. The dense rows read every byte they claim; which neurons the
sparse rows read says a SYNTHETIC trace with the paper's statistics (`trace.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ..cache import Lru, Window
from ..errors import FlashError
from ..format import Layer, Manifest, read_manifest
from ..loader import READ_THREADS
from ..reader import open_reader
from ..slots import UnitSlots
from ..stats import Stats
from .landing import Landing, WholeFiles, bundled, unbundled
from .report import Column, Report, Row, Sample, cache_state, progress
from .trace import Trace, calibrated

# OPT-6.7B at 16 bit on an M1 Max: GB read per token and I/O ms. The paper's first two
# rows are bytes divided by 6.1 GB/s, not measured.
PAPER = {
    "naive": (13.4, 2196),
    "hybrid": (6.7, 1090),
    "predictor": (0.9, 738),
    "windowing": (0.2, 164),
    "bundling": (0.2, 87),
}
COLUMNS = [
    Column("memory GB", "memory_bytes", 1e9, 2),
    Column("GB per token", "bytes_per_token", 1e9, 3),
    Column("reads per token", "reads_per_token"),
    Column("GB/s", "gb_per_s", 1, 2),
    Column("hit rate %", "hit_rate", 0.01, 1),
    Column("I/O ms", "io_ms"),
    Column("cache ms", "cache_ms", 1, 1),
    # Filled as soon as rows carry a modelled time; until then the column is not shown.
    Column("modelled I/O ms", "modelled_io_ms"),
    Column("times less", "speedup", 1, 1),
    Column("paper GB", "paper_gb", 1, 1),
    Column("paper ms", "paper_io_ms"),
]


@dataclasses.dataclass(frozen=True)
class Options:
    """`selected`, `resident`, `missing` are shares of a layer: read for a token without
    a window, held in slots, and read for a token with a window of `window` tokens."""

    tokens: int = 96
    dense_tokens: int = 3
    rounds: int = 3
    warm_up: int = 24
    selected: float = 0.10
    resident: float = 0.24
    missing: float = 0.024
    window: int = 4
    native: bool | None = None


@dataclasses.dataclass
class Player:
    """One row: reads a token's weights, and what it holds while it does."""

    name: str
    read: Callable[[int], None]  # of the token with this number
    memory_bytes: int
    stats: Stats
    tokens: int  # per round
    samples: list[Sample] = dataclasses.field(default_factory=list)
    at: int = 0

    def play(self, count: int, keep: bool = True) -> None:
        for _ in range(count):
            before = self.stats.copy()
            self.read(self.at)
            self.at += 1
            spent = self.stats - before
            if keep:
                self.samples.append(Sample.of(spent))

    def row(self) -> Row:
        gb, ms = PAPER.get(self.name, (None, None))
        read, under_way = self.stats.bytes_read, self.stats.read_s
        return Row.of(
            self.name,
            self.samples,
            self.memory_bytes,
            gb_per_s=read / 1e9 / under_way if under_way else None,
            paper_gb=gb,
            paper_io_ms=ms,
        )


class Bench:
    """The rows of one flash folder, all with the same reader and the same trace."""

    def __init__(self, folder: Path, options: Options):
        self.folder, self.options = folder, options
        self.manifest = _sparse(read_manifest(folder), folder)
        self.layers = self.manifest.layers
        self.reader = open_reader(READ_THREADS, native=options.native)
        self.slots = [max(round(options.resident * x.units), 1) for x in self.layers]
        self.noise = calibrated(
            self.layers[0].units,
            options.selected,
            self.slots[0],
            options.missing,
            Window(options.window),
        )
        count = options.warm_up + options.rounds * self._sparse_tokens
        self.traces = [
            list(Trace(x.units, options.selected, self.noise, seed).tokens(count))
            for seed, x in enumerate(progress(self.layers, "making the trace", "layer"))
        ]

    @property
    def _sparse_tokens(self) -> int:
        return max(self.options.tokens // self.options.rounds, 1)

    @property
    def _dense_tokens(self) -> int:
        return max(self.options.dense_tokens // self.options.rounds, 1)

    def file(self, layer: Layer) -> Path:
        return self.folder / layer.file

    def players(self) -> list[Player]:
        window = Window(self.options.window)
        return [
            self.dense("naive", 0),
            self.dense("hybrid", self.held_bytes()),
            self.predicted(),
            self.windowed("windowing", window, unbundled),
            self.windowed("bundling", window, bundled),
            self.windowed("bundling, LRU", Lru(), bundled),
        ]

    def held_bytes(self) -> int:
        """What sparse rows hold: all but the FFNs, and the slots' share of those."""
        slots = sum(
            n * sum(p.bytes for p in x.parts)
            for n, x in zip(self.slots, self.layers, strict=True)
        )
        return self.manifest.resident.bytes + slots

    def dense(self, name: str, held_bytes: int) -> Player:
        """Every weight that is not held is read for every token, file after file."""
        stats = Stats()
        files = WholeFiles(self.reader, stats)
        resident = self.manifest.resident
        held = held_bytes
        for path, size in [
            (self.folder / resident.file, resident.bytes),
            *((self.file(x), x.nbytes) for x in self.layers),
        ]:
            kept = min(held, size)
            held -= kept
            if kept < size:
                files.add(path, path.stat().st_size - kept)
        memory = held_bytes + files.chunks.nbytes
        return Player(name, lambda _: files.read(), memory, stats, self._dense_tokens)

    def predicted(self) -> Player:
        """What the trace selects, anew for every token, each part where it lies."""
        stats = Stats()
        most = max(len(chosen) for trace in self.traces for chosen in trace)
        part_bytes = [part.bytes for part in self.layers[0].parts]
        landing = Landing(self.reader, part_bytes, most, stats)
        sources = [
            landing.add(unbundled(self.file(x), x), x.units) for x in self.layers
        ]

        def read(token: int) -> None:
            for source, trace in zip(sources, self.traces, strict=True):
                landing.read(source, trace[token])

        memory = self.manifest.resident.bytes + landing.nbytes
        return Player("predictor", read, memory, stats, self._sparse_tokens)

    def windowed(self, name: str, policy, layout) -> Player:
        """What the trace selects and is not in slots."""
        stats = Stats()
        stores = [
            UnitSlots(
                x, self.folder, n, policy, self.reader, stats, layout(self.file(x), x)
            )
            for n, x in zip(self.slots, self.layers, strict=True)
        ]

        def read(token: int) -> None:
            for store, trace in zip(stores, self.traces, strict=True):
                for _ in store.fetch(trace[token]):
                    pass

        return Player(name, read, self.held_bytes(), stats, self._sparse_tokens)


def run(folder: Path, options: Options) -> Report:
    """Measure all rows, in turns, so that a slow spell of the disk meets them all.

    Args:
        folder: A flash folder of neurons; the trace takes the place of its predictors.

    Raises:
        FlashError: If it is no such folder.
    """
    bench = Bench(folder, options)
    with bench.reader:
        players = bench.players()
        for player in progress(players, "warming up", "row"):
            if player.tokens == bench._sparse_tokens:
                player.play(options.warm_up, keep=False)
                player.stats.reset()
        for _ in progress(range(options.rounds), "measuring", "round"):
            for player in players:
                player.play(player.tokens)
        direct = bench.reader.direct
    rows = [player.row() for player in players]
    for row in rows:
        row.more["speedup"] = rows[0].io_ms / row.io_ms if row.io_ms else None
    return Report("table 2", rows, COLUMNS, notes(bench, direct), facts(bench, direct))


def notes(bench: Bench, direct: bool) -> list[str]:
    o, first = bench.options, bench.layers[0]
    return [
        f"Each part of the method, {len(bench.layers)} layers of {first.units:,} "
        f"neurons, {bench.manifest.model_bytes / 1e9:.2f} GB of "
        f"{bench.manifest.dtype}, bundles of {first.unit_bytes / 1024:g} KiB, "
        f"{READ_THREADS} reads in flight; {cache_state(direct)}.",
        "naive and hybrid read every byte. Which neurons the other rows read is a "
        f"SYNTHETIC trace: {o.selected:.1%} of a layer per token, of which a window of "
        f"{o.window} tokens brings {o.missing:.1%} of the layer (noise "
        f"{bench.noise:.3f}); {o.resident:.0%} of each layer has slots. Predictor and "
        "windowing read each neuron's up row and down column apart.",
        f"± is the deviation over tokens, {o.rounds} rounds of all rows in turn. "
        "Nothing is multiplied: memory is what such a run holds, without predictors. "
        "The paper's rows are OPT-6.7B on an M1 Max, its first two bytes over "
        "bandwidth.",
    ]


def facts(bench: Bench, direct: bool) -> dict:
    return {
        "trace": "synthetic",
        "cache_state": cache_state(direct),
        "native_reader": bench.reader.native,
        "model_bytes": bench.manifest.model_bytes,
        "layers": len(bench.layers),
        "units": bench.layers[0].units,
        "unit_bytes": bench.layers[0].unit_bytes,
        "noise": bench.noise,
        "options": dataclasses.asdict(bench.options),
    }


def _sparse(manifest: Manifest, folder: Path) -> Manifest:
    if manifest.unit != "neuron":
        raise FlashError(
            f"{folder} holds {manifest.unit}s; table 2 is about neurons. Give a folder "
            "with a ReLU model, or none for a synthetic one."
        )
    first = manifest.layers[0]
    alike = {(x.units, x.unit_bytes, x.parts) for x in manifest.layers}
    if len(alike) > 1:
        raise FlashError(
            f"{folder} has layers of several sizes; one trace cannot serve them. Give "
            f"a model whose FFNs all have {first.units:,} neurons."
        )
    return manifest
