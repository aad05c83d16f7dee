"""The rows of Table 2: one set of files, each row with parts of the method switched
off. What each reads for a token, and what it holds meanwhile."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..errors import FlashError
from ..layers.kinds import NEURON, kind_of
from ..loading import READ_THREADS
from ..memory.fence import Fence
from ..memory.policies import Lru, Window
from ..memory.slots import UnitSlots
from ..memory.stats import Stats
from ..storage.manifest import Layer, Manifest
from ..storage.manifest_reading import read_manifest
from ..storage.reader import Extent, Reader, open_reader
from .landing import Landing, WholeFiles, bring, bundled, unbundled
from .paper import TABLE_2
from .report import Row, Sample, progress
from .selections import Selections, calibrated

# The paper's rows by the names they have here.
PAPER = dict(
    zip(("naive", "hybrid", "predictor", "windowing", "bundling"), TABLE_2, strict=True)
)


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


@dataclasses.dataclass
class Player:
    """One row: reads a token's weights, and what it holds while it does."""

    name: str
    read: Callable[[int], None]  # of the token with this number
    memory_bytes: int
    stats: Stats
    tokens: int = 0  # per round
    sparse: bool = True  # follows the selections, and needs their warm-up
    layers: Sequence[UnitSlots] = ()  # where it keeps units
    samples: list[Sample] = dataclasses.field(default_factory=list)
    at: int = 0

    def play(self, count: int, keep: bool = True) -> None:
        for _ in range(count):
            before = self.stats.copy()
            self.read(self.at)
            self.at += 1
            spent = self.stats - before
            if keep:
                self.samples.append(Sample(spent))

    def row(self, **more) -> Row:
        """The means of its tokens, beside the paper's row of this name."""
        if paper := PAPER.get(self.name):
            more |= {"paper_gb": paper.gb, "paper_io_ms": paper.io_ms}
        return Row.of(self.name, self.samples, self.memory_bytes, **more)


def warm_up(players: Sequence[Player], tokens: int) -> None:
    """Let those that follow the selections play some tokens that do not count."""
    for player in progress(players, "warming up", "row"):
        if player.sparse:
            player.play(tokens, keep=False)
            player.stats.reset()


def slots_player(
    name: str,
    layers: Sequence[Layer],
    extents: Sequence[list[Extent]],
    slots: int,
    steps: Sequence[Sequence[np.ndarray]],
    policy: Lru,
    reader: Reader,
    **more,
) -> Player:
    """Brings what a token selects and slots do not hold.

    Args:
        extents: Where the units of each layer lie.
        slots: Of each layer.
        steps: Of each layer, the units that each token selects.
        more: Further fields of the `Player`.
    """
    stats, fence = Stats(), Fence()
    made = [
        UnitSlots(layer, extent, slots, policy, reader, fence, stats)
        for layer, extent in zip(layers, extents, strict=True)
    ]

    def read(token: int) -> None:
        for unit_slots, units in zip(made, steps, strict=True):
            bring(unit_slots, units[token])

    return Player(name, read, stats=stats, layers=made, **more)


class Bench:
    """What the rows of one flash folder share: reader, slots, and the selections.

    Args:
        policy: Under which slots are to miss `options.missing` of a layer per token.
    """

    def __init__(self, folder: Path, options: Options, policy: Lru):
        self.folder, self.options = folder, options
        self.manifest = _sparse(read_manifest(folder), folder)
        self.layers = self.manifest.layers
        self.reader = open_reader(READ_THREADS)
        units = self.layers[0].units  # as all have
        self.slots = max(round(options.resident * units), 1)
        self.noise = calibrated(
            units, options.selected, self.slots, options.missing, policy
        )
        # Tokens that a row plays in each round
        self.sparse_tokens = max(options.tokens // options.rounds, 1)
        self.dense_tokens = max(options.dense_tokens // options.rounds, 1)
        count = options.warm_up + options.rounds * self.sparse_tokens
        self.selections = [
            list(Selections(units, options.selected, self.noise, i).tokens(count))
            for i in progress(range(len(self.layers)), "selecting", "layer")
        ]

    def file(self, layer: Layer) -> Path:
        return self.folder / layer.file

    def players(self) -> list[Player]:
        window = Window(self.options.window)
        return [
            self.dense("naive", 0),
            self.dense("hybrid", self.held_bytes()),
            self.predicted(),
            self.windowed("windowing", window, unbundled),
            self.windowed("bundling", window),
            self.windowed("bundling, LRU", Lru()),
        ]

    def held_bytes(self) -> int:
        """What sparse rows hold: all but the FFNs, and the slots' share of those."""
        unit_bytes = sum(part.bytes for part in self.layers[0].parts)
        slot_bytes = len(self.layers) * self.slots * unit_bytes
        return self.manifest.resident.bytes + slot_bytes

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
        """What is selected, anew for every token, each part where it lies."""
        stats = Stats()
        most = max(len(chosen) for tokens in self.selections for chosen in tokens)
        part_bytes = [part.bytes for part in self.layers[0].parts]
        landing = Landing(self.reader, part_bytes, most, stats)
        sources = [landing.add(unbundled(x, self.folder), x.units) for x in self.layers]

        def read(token: int) -> None:
            for source, tokens in zip(sources, self.selections, strict=True):
                landing.read(source, tokens[token])

        memory = self.manifest.resident.bytes + landing.nbytes
        return Player("predictor", read, memory, stats, self.sparse_tokens)

    def windowed(
        self,
        name: str,
        policy: Lru,
        layout: Callable[[Layer, Path], list[Extent]] = bundled,
        reader: Reader | None = None,
    ) -> Player:
        """What is selected and not in slots, through a reader of its own if given."""
        return slots_player(
            name,
            self.layers,
            [layout(layer, self.folder) for layer in self.layers],
            self.slots,
            self.selections,
            policy,
            reader or self.reader,
            memory_bytes=self.held_bytes(),
            tokens=self.sparse_tokens,
        )


def _sparse(manifest: Manifest, folder: Path) -> Manifest:
    if kind_of(manifest) is not NEURON:
        raise FlashError(
            f"{folder} holds {manifest.unit}s; this is about neurons. Give a folder "
            "with a ReLU model, or none for a synthetic one."
        )
    first = manifest.layers[0]
    alike = {(x.units, x.unit_bytes, x.parts) for x in manifest.layers}
    if len(alike) > 1:
        raise FlashError(
            f"{folder} has layers of several sizes; the same selections cannot serve "
            f"all. Give a model whose FFNs all have {first.units:,} neurons."
        )
    return manifest
