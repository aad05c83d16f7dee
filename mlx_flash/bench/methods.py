"""The rows of Table 2: one reader and one set of files, each row with parts switched
off. What each reads for a token, and what it holds meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ..errors import FlashError
from ..loading import READ_THREADS
from ..memory.policies import Lru, Window
from ..memory.slots import UnitSlots
from ..memory.stats import Stats
from ..storage.manifest import Layer, Manifest, read_manifest
from ..storage.reader import open_reader
from .landing import Landing, WholeFiles, bundled, unbundled
from .report import Row, Sample, progress
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
    sparse: bool = True  # follows the trace, and needs its warm-up
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
        count = options.warm_up + options.rounds * self.sparse_tokens
        self.traces = [
            list(Trace(x.units, options.selected, self.noise, seed).tokens(count))
            for seed, x in enumerate(progress(self.layers, "making the trace", "layer"))
        ]

    @property
    def sparse_tokens(self) -> int:
        return max(self.options.tokens // self.options.rounds, 1)

    @property
    def dense_tokens(self) -> int:
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
        tokens = self.dense_tokens
        return Player(name, lambda _: files.read(), memory, stats, tokens, False)

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
        return Player("predictor", read, memory, stats, self.sparse_tokens)

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

        return Player(name, read, self.held_bytes(), stats, self.sparse_tokens)


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
