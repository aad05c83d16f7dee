"""Conversions whose machine loses power, at every point and in many ways.

A conversion runs once, and all it changes on disk is noted. From the notes each folder
is rebuilt that a loss of power may leave. There the destination is absent or whole, and
the same command gets to what an undisturbed conversion gives, byte by byte.
"""

import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conversions import OPTIONS
from opt_checkpoints import files_of, make_checkpoint
from power_log import Disk, read_notes, scan, write_state
from stock_checkpoints import LLAMA, QWEN3, write_checkpoint

from mlx_flash.converters import convert as converting
from mlx_flash.converters import source
from mlx_flash.errors import FlashError
from mlx_flash.inspection import verify

HERE = Path(__file__).parent
PLAIN = {"progress": False}
KINDS = {
    "neuron": (lambda folder: make_checkpoint(folder), OPTIONS),
    "expert": (lambda folder: write_checkpoint(folder, QWEN3), PLAIN),
    "block": (lambda folder: write_checkpoint(folder, LLAMA), PLAIN),
}
# Into a folder that is not there yet, and in the place of an older one
WAYS = {"new": {}, "moved": {"delete_source": True}}
WAYS["replaced"] = {"delete_source": True, "overwrite": True}
LOCK = "flash.mlx-flash-lock"
FEW, MANY = 2, 120  # folders that are rebuilt, of each kind and way
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")


def convert(root, options):
    """Convert root/source to root/in/flash. A rebuilt file has times of its own."""
    sizes = lambda file: [file.stat().st_size, 0, 0]  # noqa: E731
    source.identity = converting.identity = sizes
    converting.convert(root / "source", root / "in" / "flash", **options)


def child(root, options, error):
    try:
        convert(root, options)
    except FlashError as refusal:
        error.put(str(refusal))
    else:
        error.put("")


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported all and computed nothing: they start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlx_flash.converters.convert", __name__])
    return context


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    if not (compiler := shutil.which("cc")):
        pytest.skip("needs a C compiler, to note what is written")
    library = tmp_path_factory.mktemp("shim") / "power_log.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-pthread"]
    subprocess.run([*command, HERE / "power_log.c", "-o", library], check=True)
    return library


class Case:
    """One conversion, the notes of it, and what is left where its power fails."""

    def __init__(self, base, kind, way, shim, processes):
        make, options = KINDS[kind]
        self.processes, self.options = processes, options | WAYS[way]
        self.root, self.seen = base / "root", set()
        self.dst = self.root / "in" / "flash"
        self.root.mkdir()
        self.counts = Counter()
        make(self.root / "source")
        self.allowed = []
        if way == "replaced":
            self.run()
            old = self.dst / "flash.json"
            old.write_text(old.read_text() + "\n")  # another, and as whole
            make(self.root / "again")
            shutil.rmtree(self.root / "source")
            (self.root / "again").rename(self.root / "source")
            self.allowed.append(files_of(self.dst))
        self.disk = Disk(self.root)
        self.weights = set((self.root / "source").glob("*.safetensors"))
        self.events = list(read_notes(self.record(base / "log", shim)))
        self.whole = files_of(self.dst)
        assert self.whole not in self.allowed
        self.allowed.append(self.whole)
        verify(self.dst, lambda file: None)

    def record(self, log, shim):
        """The notes of a conversion in a process of its own."""
        script = (
            f"import sys; sys.path[:0] = {[str(HERE), str(HERE.parent)]!r}; "
            "import pathlib, test_power_loss; "
            f"test_power_loss.convert(pathlib.Path({str(self.root)!r}), "
            f"{self.options!r})"
        )
        more = {"LD_PRELOAD": shim, "POWER_ROOT": self.root, "POWER_LOG": log}
        env = os.environ | {name: str(value) for name, value in more.items()}
        subprocess.run([sys.executable, "-c", script], env=env, check=True)
        return log.read_bytes()

    def run(self):
        """What a conversion is refused with, or ""."""
        error = self.processes.SimpleQueue()
        arguments = (self.root, self.options, error)
        process = self.processes.Process(target=child, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == 0
        return error.get()

    def states(self, rng):
        """Each folder once that a loss of power may leave, after every event."""
        for number, event in enumerate(self.events):
            self.disk.replay(event)
            for state in self.disk.states(rng):
                key = hash(frozenset(state.items()))
                if key not in self.seen:
                    self.seen.add(key)
                    yield number, state
        assert self.left_of(self.disk.top) == self.left_of(scan(self.root))

    def left_of(self, node):
        """All that the notes speak of is on disk, and nothing else."""
        if node.names is None:
            return node.content
        return {name: self.left_of(child) for name, child in node.names.items()}

    def judge(self, number, state):
        """Rebuild a folder, look at it, and repeat the command."""
        where = f"after event {number} of {len(self.events)}: {self.events[number][:3]}"
        shutil.rmtree(self.root)
        self.root.mkdir()
        write_state(self.root, state)
        found = files_of(self.dst) if self.dst.exists() else None
        assert found is None or found in self.allowed, where
        if not all(file.exists() for file in self.weights):
            assert found == self.whole, where
        done = found == self.whole and not (self.root / "in" / LOCK).exists()
        refusal = self.run()
        if refusal and done:  # nothing is left to do: it exists, its source is gone
            self.counts["finished before"] += 1
        else:
            assert not refusal, f"{where}: {refusal}"
            self.counts["converted"] += 1
        assert files_of(self.dst) == self.whole, where
        if self.options.get("delete_source"):
            assert not any(file.exists() for file in self.weights), where
        left = [path.name for path in self.dst.parent.iterdir()]
        assert left == ["flash"], f"{where}: {left}"


def lose_power(case, most):
    rng = random.Random(0)
    states = list(case.states(rng))
    for number, state in rng.sample(states, min(most, len(states))):
        case.judge(number, state)
    return len(states)


@pytest.mark.parametrize("kind", KINDS)
def test_power_fails_at_a_few_points(tmp_path, kind, shim, processes):
    lose_power(Case(tmp_path, kind, "moved", shim, processes), FEW)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_power_fails_at_every_point(tmp_path, kind, way, shim, processes, capsys):
    case = Case(tmp_path, kind, way, shim, processes)
    states = lose_power(case, MANY)
    with capsys.disabled():
        print(
            f"\n{kind}, {way}: {len(case.events)} points, {states} folders that they "
            f"may leave, of which tried: {dict(case.counts)}, 0 wrong"
        )
