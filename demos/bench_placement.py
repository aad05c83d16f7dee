"""What placing neurons by co-activation saves in reads, on real activations.

A flash folder's neurons are placed along their co-activations on one half of a text,
and the other half is played through the engine's slots and reader from permuted copies
of the bundles: the same neurons, the same slots, another order on flash. Rows differ in
placement and in the gap that the reader reads over. A cost curve measured on the same
disk first says which gap breaks even; that holds for a full queue, so smaller gaps are
played as well. Direct I/O; rows take turns, a block of tokens each.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

import mlx_flash
from mlx_flash.cli.common import DEMO_MODEL
from mlx_flash.converters.calibrate.placement import order_by_coactivation
from mlx_flash.loading import READ_THREADS
from mlx_flash.memory.policies import Lrfu, Lru
from mlx_flash.memory.slot_cache import SlotCache
from mlx_flash.memory.slots import UnitSlots
from mlx_flash.memory.stats import Stats
from mlx_flash.storage import manifest as format
from mlx_flash.storage.limits import PAGE_BYTES
from mlx_flash.storage.reader import Extent, open_reader
from mlx_flash.storage.safetensors import read_header
from mlx_flash.traces.trace import Trace
from mlx_flash.tracing import record_text

POLICIES = {"lru": Lru, "lrfu": Lrfu}


def missing_bits(trace: Trace, layer: int, slots: int, policy: Lru) -> np.ndarray:
    """Like the trace's bits, but of what a cache of so many slots has to read."""
    units = trace.units[layer]
    cache = SlotCache(units, slots, policy)
    read = np.zeros((len(trace.tokens[layer]), units), bool)
    for row, (asked, tokens, _) in zip(read, trace.steps(layer), strict=True):
        for wave in cache.waves(asked, tokens):
            row[wave.missing] = True
    return np.packbits(read, axis=1)


def permuted_copy(layer: format.Layer, folder: Path, order: np.ndarray, path: Path):
    """The layer's file with its bundles in another order."""
    header = (folder / layer.file).read_bytes()
    _, start = read_header(folder / layer.file)
    end = start + layer.units * layer.unit_bytes
    bundles = np.frombuffer(header[start:end], np.uint8)
    bundles = bundles.reshape(layer.units, layer.unit_bytes)
    path.write_bytes(header[:start] + bundles[order].tobytes() + header[end:])


class Row:
    """One placement and one gap: all layers' slots over one reader."""

    def __init__(self, name, manifest, files, places, slots, policy, gap):
        self.name, self.stats, self.places = name, Stats(), places
        self.reader = open_reader(READ_THREADS, max_gap_bytes=gap)
        self.layers = []
        for layer, path in zip(manifest.layers, files, strict=True):
            parts = tuple((i, p.offset, p.bytes) for i, p in enumerate(layer.parts))
            extents = [Extent(path, layer.data_offset, layer.unit_bytes, parts)]
            store = UnitSlots(
                layer, path.parent, slots, policy, self.reader, self.stats, extents
            )
            self.layers.append(store)
        self.blocks: list[Stats] = []

    def play(self, steps: list, start: int, stop: int) -> None:
        before = self.stats.copy()
        for t in range(start, stop):
            for store, place, layer in zip(
                self.layers, self.places, steps, strict=True
            ):
                for _ in store.fetch(np.sort(place[layer[t]])):
                    pass
        self.blocks.append(self.stats - before)

    def result(self, tokens: int) -> dict:
        spent = sum(self.blocks[1:], self.blocks[0])
        times = [1e3 * b.io_s * len(self.blocks) / tokens for b in self.blocks]
        return {
            "name": self.name,
            "reads_per_token": spent.reads / tokens,
            "bytes_per_token": spent.bytes_read / tokens,
            "bytes_per_read": spent.bytes_read / spent.reads,
            "neurons_per_read": spent.misses / spent.reads,
            "hit_rate": spent.hit_rate,
            "io_ms": float(np.median(times)),
            "io_ms_rounds": [round(t, 3) for t in times],
        }


def cost_curve(folder: Path, pages=(1, 2, 4, 8, 16), rounds=7, reads=256) -> dict:
    """Seconds per read of so many pages, queue full: median over rounds in turn.

    Random places of a file of 256 MB, so that no cache of the drive is asked twice.
    """
    path, most = folder / "curve", max(pages)
    rows = 65_536 // most
    with open(path, "wb") as file:
        chunk = np.random.default_rng(0).bytes(most * PAGE_BYTES)
        for _ in range(rows):
            file.write(chunk)
    rng, times = np.random.default_rng(1), {n: [] for n in pages}
    with open_reader(READ_THREADS) as reader:
        sources = {}
        for n in pages:
            slots = np.zeros((reads, n * PAGE_BYTES), np.uint8)
            extent = Extent(path, 0, most * PAGE_BYTES, ((0, 0, n * PAGE_BYTES),))
            sources[n] = reader.add_source([extent], [slots], rows)
        for _ in range(rounds):
            for n in pages:
                units = rng.choice(rows, reads, replace=False)
                begin = time.perf_counter()
                reader.wait(reader.submit(sources[n], units, np.arange(reads)))
                times[n].append((time.perf_counter() - begin) / reads)
        direct = reader.direct
    path.unlink()
    seconds = {n: float(np.median(t)) for n, t in times.items()}
    slope, base = np.polyfit(list(pages), list(seconds.values()), 1)
    # Merging over a gap of g pages costs g * slope and saves the base of a read.
    gap = int(base / slope) if base > 0 and slope > 0 else 0
    return {
        "direct_io": direct,
        "us_per_read": {n: round(1e6 * s, 2) for n, s in seconds.items()},
        "gap_pages": max(gap, 0),
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| placement, gap | reads per token | KB per token | KB per read | "
        "neurons per read | hits | I/O ms per token |",
        "|---" * 7 + "|",
    ]
    for r in rows:
        lines.append(
            f"| {r['name']} | {r['reads_per_token']:.1f} | "
            f"{r['bytes_per_token'] / 1e3:,.0f} | {r['bytes_per_read'] / 1e3:.2f} | "
            f"{r['neurons_per_read']:.2f} | {r['hit_rate']:.1%} | {r['io_ms']:.2f} |"
        )
    return "\n".join(lines)


@click.command()
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--place-text",
    type=click.Path(exists=True, path_type=Path),
    help="Text to place by.  [default: the first half of TEXT]",
)
@click.option("--model", default=str(DEMO_MODEL), show_default="the demo model")
@click.option("--memory", default="50%", show_default=True)
@click.option("--tokens", default=1024, show_default=True, help="Played.")
@click.option("--place-tokens", default=8192, show_default=True, help="Placed by.")
@click.option("--policy", type=click.Choice(list(POLICIES)), default="lru")
@click.option("--rounds", default=8, show_default=True, help="Blocks of the tokens.")
def main(text, place_text, model, memory, tokens, place_tokens, policy, rounds):
    """Compare placements of MODEL's neurons on TEXT, at equal memory."""
    words = text.read_text()
    half = len(words) // 2
    learn = place_text.read_text() if place_text else words[:half]
    with mlx_flash.load(model, memory=memory, context=128) as (net, tokenizer):
        learned = record_text(net, tokenizer, learn, place_tokens)
        played = record_text(net, tokenizer, words[half:], tokens)
        manifest, slots = net.flash.manifest, min(net.flash.budget.slots)
    chosen = POLICIES[policy]()
    steps = [[u for u, *_ in played.steps(i)] for i in range(len(played.units))]
    count = len(steps[0])
    orders = {"checkpoint": [], "co-activation": [], "co-reading": []}
    begin = time.perf_counter()
    for i, units in enumerate(learned.units):
        orders["checkpoint"].append(np.arange(units))
        orders["co-activation"].append(order_by_coactivation(learned.bits[i], units))
        read = missing_bits(learned, i, slots, chosen)
        orders["co-reading"].append(order_by_coactivation(read, units))
    placing_s = time.perf_counter() - begin
    with tempfile.TemporaryDirectory(dir=".") as name:
        curve = cost_curve(Path(name))
        gaps = sorted({0, 1, 4, curve["gap_pages"]})
        rows = []
        for placement, permutations in orders.items():
            files = []
            for i, (layer, order) in enumerate(
                zip(manifest.layers, permutations, strict=True)
            ):
                files.append(Path(name) / f"{placement}_{i}.safetensors")
                permuted_copy(layer, Path(model), order, files[-1])
            places = [np.argsort(order) for order in permutations]
            for gap in gaps:
                title = f"{placement}, {4 * gap} KiB"
                facts = manifest, files, places, slots, chosen, gap * PAGE_BYTES
                rows.append(Row(title, *facts))
        ends = np.linspace(0, count, rounds + 1).astype(int)
        for start, stop in zip(ends[:-1], ends[1:], strict=True):
            for row in rows:
                row.play(steps, start, stop)
        results = [row.result(count) for row in rows]
        for row in rows:
            row.reader.close()
    print(
        f"{count} tokens of {text.name}, {slots} slots of {manifest.layers[0].units} "
        f"neurons a layer, {policy}; placed by {place_tokens} other tokens in "
        f"{placing_s:.1f} s. A read of 1, 2, 4, … pages of 4 KiB takes "
        f"{', '.join(str(v) for v in curve['us_per_read'].values())} us at a full "
        f"queue ({'direct' if curve['direct_io'] else 'WARM, through the page cache'})"
        f": reading over {curve['gap_pages']} pages breaks even.\n\n{table(results)}\n"
    )
    facts = {
        "benchmark": "placement",
        "command": " ".join(sys.argv),
        "text": text.name,
        "tokens": count,
        "slots": slots,
        "policy": policy,
        "curve": curve,
        "rows": results,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
