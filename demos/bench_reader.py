"""How fast the reader and the slot cache bring FFN neurons, beside what the disk can.

Bundles of the shape of OPT-6.7B at 16 bit are written by mlx-flash's own writer and
read back through its reader and slots, without any multiplication. Which neurons a
token selects is synthetic, calibrated to the figures of LLM in a flash: a tenth of a
layer selected, 24 % of it in memory, 2.4 % read per token. Between the blocks of tokens
fio reads the same files, in reads as long as a bundle and with as many threads. Direct
I/O all along: no read is answered by this machine's page cache.
"""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
from synthetic import bar, flash_folder

import mlx_flash
from mlx_flash.bench.trace import Trace, calibrated
from mlx_flash.loading import READ_THREADS
from mlx_flash.memory.policies import Lru, Window
from mlx_flash.memory.slots import UnitSlots
from mlx_flash.memory.stats import Stats
from mlx_flash.storage.limits import PAGE_BYTES
from mlx_flash.storage.reader import open_reader

COUNTERS = [field.name for field in dataclasses.fields(Stats)]


class Player:
    """One row of the table: all layers' slots with a reader and a policy of its own."""

    def __init__(self, name, folder, manifest, n_slots, policy, native):
        self.name, self.stats = name, Stats()
        self.reader = open_reader(READ_THREADS, native=native)
        self.layers = [
            UnitSlots(layer, folder, n_slots, policy, self.reader, self.stats)
            for layer in manifest.layers
        ]
        self.at = 0  # tokens played
        self.blocks: list[np.ndarray] = []  # [tokens, counters] of each round
        self.fio: list[float] = []  # GB/s around each block

    def play(self, traces: list, count: int) -> None:
        """Fetch the next tokens' neurons of every layer, and note what each cost."""
        rows = []
        for _ in range(count):
            before = self.stats.copy()
            for store, trace in zip(self.layers, traces, strict=True):
                for _ in store.fetch(trace[self.at]):
                    pass
            self.at += 1
            spent = self.stats - before
            rows.append([getattr(spent, name) for name in COUNTERS])
        self.blocks.append(np.array(rows, float))

    def column(self, name: str) -> np.ndarray:
        return np.concatenate(self.blocks)[:, COUNTERS.index(name)]

    def resident(self) -> float:
        """Share of all units that is in slots now."""
        caches = [store.cache for store in self.layers]
        held = sum((cache.slot_of >= 0).sum() for cache in caches)
        return float(held / sum(len(cache.slot_of) for cache in caches))

    def row(self) -> dict:
        """Means and deviations over tokens; bandwidths and ratios round by round."""
        read, in_flight = COUNTERS.index("bytes_read"), COUNTERS.index("read_s")
        gb_per_s = [b[:, read].sum() / 1e9 / b[:, in_flight].sum() for b in self.blocks]
        units = sum(store.units for store in self.layers)
        selected = self.column("hits") + self.column("misses")
        return {
            "name": self.name,
            "direct_io": self.reader.direct,
            "slots": self.layers[0].n_slots,
            "resident_share": self.resident(),
            "selected_share": selected.mean() / units,
            "missing_share": self.column("misses").mean() / units,
            "bytes_per_token": self.column("bytes_read").mean(),
            "reads_per_token": self.column("reads").mean(),
            "bytes_per_read": self.column("bytes_read").sum()
            / self.column("reads").sum(),
            "reads_per_s": self.column("reads").sum() / self.column("read_s").sum(),
            "gb_per_s": spread(gb_per_s),
            "fio_gb_per_s": spread(self.fio),
            "of_fio": spread(np.divide(gb_per_s, self.fio)) if self.fio else None,
            "io_ms": spread(1e3 * self.column("io_s")),
            "cache_ms": spread(1e3 * self.column("cache_s")),
        }


def spread(values) -> dict:
    """Mean, deviation and median of rounds or tokens; the values if they are few."""
    values = np.asarray(values, float)
    if not len(values):
        return {}
    found = {"mean": values.mean(), "std": values.std(), "median": np.median(values)}
    if len(values) <= 16:
        found["values"] = [round(v, 4) for v in values.tolist()]
    return {k: v if k == "values" else float(v) for k, v in found.items()}


def fio(files: list[Path], block_bytes: int, threads: int, seconds: float) -> float:
    """GB/s of random direct reads spread over `files`."""
    command = ["fio", "--name=bundles", "--filename=" + ":".join(map(str, files))]
    command += ["--rw=randread", f"--bs={block_bytes}", "--direct=1", "--readonly"]
    command += ["--ioengine=psync", "--thread", f"--numjobs={threads}"]
    command += ["--group_reporting", "--norandommap", "--randrepeat=0"]
    command += ["--time_based", f"--runtime={seconds}", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"fio failed: {done.stderr.strip() or done.stdout.strip()}")
    read = json.loads(done.stdout)["jobs"][0]["read"]
    return read["bw_bytes"] / 1e9


def say(cell: dict, digits: int = 2) -> str:
    return f"{cell['mean']:.{digits}f} ± {cell['std']:.{digits}f}" if cell else "–"


def table(rows: list[dict]) -> str:
    lines = [
        "| row | resident | read per token | MB per token | reads | KiB per read | "
        "reads/s | GB/s in flight | fio GB/s | of fio | I/O ms per token | "
        "cache ms per token (median) |",
        "|---" * 12 + "|",
    ]
    for r in rows:
        cells = [
            r["name"],
            f"{r['resident_share']:.1%}",
            f"{r['missing_share']:.2%}",
            f"{r['bytes_per_token'] / 1e6:.1f}",
            f"{r['reads_per_token']:,.0f}",
            f"{r['bytes_per_read'] / 1024:.2f}",
            f"{r['reads_per_s']:,.0f}",
            say(r["gb_per_s"]),
            say(r["fio_gb_per_s"]),
            say(r["of_fio"]),
            say(r["io_ms"], 0),
            f"{say(r['cache_ms'])} ({r['cache_ms']['median']:.2f})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> dict:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if "model name" in x), cpu)
    return {
        "system": platform.platform(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "mlx": mx.__version__,
        "mlx_flash": mlx_flash.__version__,
    }


@click.command()
@click.option("--layers", default=32, show_default=True)
@click.option("--units", default=16384, show_default=True, help="Neurons of a layer.")
@click.option("--dims", default=4096, show_default=True, help="Model width.")
@click.option("--reader", type=click.Choice(["c", "python", "both"]), default="both")
@click.option(
    "--window", "windows", multiple=True, type=int, help="Add a row: window policy."
)
@click.option("--tokens", default=96, show_default=True, help="Measured, per row.")
@click.option("--rounds", default=4, show_default=True, help="Blocks of those tokens.")
@click.option("--warm-up", default=24, show_default=True, help="Tokens before them.")
@click.option("--selected", default=0.10, show_default=True, help="Share, per token.")
@click.option("--resident", default=0.24, show_default=True, help="Share in slots.")
@click.option("--missing", default=0.024, show_default=True, help="Share read, LRU.")
@click.option("--fio-seconds", default=4.0, show_default=True, help="0 leaves it out.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Keep the bundles there, and use them again.  [default: deleted at the end]",
)
def main(folder, **options):
    """Measure reader and slot cache on a synthetic OPT-6.7B, against fio."""
    with ExitStack() as stack:
        if folder is None:
            where = stack.enter_context(tempfile.TemporaryDirectory(dir="."))
            folder = Path(where) / "bundles"
        run(folder, stack, **options)


def run(folder, stack, *, layers, units, dims, reader, windows, tokens, rounds, **o):
    manifest = flash_folder(folder, layers, units, dims)
    files = [folder / layer.file for layer in manifest.layers]
    n_slots = max(round(o["resident"] * units), 1)
    noise = calibrated(units, o["selected"], n_slots, o["missing"], Lru())
    per_block = max(tokens // rounds, 1)
    length = o["warm_up"] + rounds * per_block
    traces = [
        list(Trace(units, o["selected"], noise, seed).tokens(length))
        for seed in bar(range(layers), desc="making the trace", unit="layer")
    ]
    first = reader != "python"
    readers = {"c": [True], "python": [False], "both": [True, False]}[reader]
    wanted = [("LRU", Lru(), native) for native in readers]
    wanted += [(f"window {k}", Window(k), first) for k in windows]
    players = []
    for name, policy, native in wanted:
        name = f"{name}, {'C' if native else 'Python'} reader"
        player = Player(name, folder, manifest, n_slots, policy, native)
        stack.callback(player.reader.close)
        players.append(player)
    for player in bar(players, desc="warming up", unit="row"):
        player.play(traces, o["warm_up"])
        player.blocks.clear()
    unit_bytes = manifest.layers[0].unit_bytes
    with_fio = o["fio_seconds"] > 0 and shutil.which("fio") is not None
    if o["fio_seconds"] > 0 and not with_fio:
        print(
            "fio is not installed, so there is nothing to compare the reader with: "
            "apt install fio, or brew install fio.\n"
        )

    def disk() -> float:
        return fio(files, unit_bytes, READ_THREADS, o["fio_seconds"])

    before = disk() if with_fio else 0.0
    for _ in bar(range(rounds), desc="measuring", unit="round"):
        for player in players:
            player.play(traces, per_block)
            if with_fio:
                after = disk()
                player.fio.append((before + after) / 2)
                before = after
    rows = [player.row() for player in players]
    direct = all(row["direct_io"] for row in rows) and unit_bytes % PAGE_BYTES == 0
    cold = (
        "cold: direct I/O past the page cache; a cache below it, of the disk or of a "
        "virtual machine's host, could not be purged"
        if direct
        else "WARM: not every read goes past the page cache"
    )
    print(
        f"SYNTHETIC selection trace (noise {noise:.3f}) over {layers} layers of "
        f"{units:,} neurons, d_model {dims:,}, {manifest.ffn_bytes / 1e9:.2f} GB of "
        f"float16 in bundles of {unit_bytes / 1024:g} KiB; {n_slots:,} slots per "
        f"layer, {rows[0]['selected_share']:.1%} of it is selected per token.\n"
        f"{rounds} rounds of {per_block} tokens for each row, {o['warm_up']} to warm "
        f"up; before and after each {READ_THREADS} threads of fio, "
        f"{o['fio_seconds']:g} s. ± is the deviation over tokens, of GB/s and ratios "
        f"over rounds.\n{cold}\n\n"
        f"{table(rows)}\n"
    )
    facts = {
        "benchmark": "reader",
        "trace": "synthetic",
        "cache_state": cold,
        "command": " ".join(sys.argv),
        "machine": machine(),
        "fio": subprocess.check_output(["fio", "--version"], text=True).strip()
        if with_fio
        else None,
        "layers": layers,
        "units": units,
        "dims": dims,
        "threads": READ_THREADS,
        "rounds": rounds,
        "tokens_per_round": per_block,
        "warm_up_tokens": o["warm_up"],
        "noise": noise,
        "rows": rows,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
