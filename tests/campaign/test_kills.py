"""Conversions that are killed, run out of disk or lose power: never a wrong model.

Each kill is a SIGKILL to a process that converts a tiny model; the same command must
then give what an undisturbed one gave, byte by byte. The campaign has no randomness of
its own: its seed is fixed.
"""

import fcntl
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conversions import OPTIONS
from opt_checkpoints import files_of, make_checkpoint
from stock_checkpoints import LLAMA, QWEN3, write_checkpoint

from mlx_flash.converters.convert import convert
from mlx_flash.errors import FlashError

KILLS = 200
DISKS = 50
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
PLAIN = {"progress": False}
KINDS = {
    "neuron": (lambda folder: make_checkpoint(folder), OPTIONS),
    "expert": (lambda folder: write_checkpoint(folder, QWEN3), PLAIN),
    "block": (lambda folder: write_checkpoint(folder, LLAMA), PLAIN),
}


def child(src, dst, options, point, counted):
    """Convert; at the file operation number `point` below `dst`'s folder, be killed."""
    seen = 0

    def watch(event, args):
        nonlocal seen
        if event in FILE_EVENTS and str(args[0]).startswith(str(dst)):
            seen += 1
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    convert(src, dst, **options)
    counted.value = seen


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported all and computed nothing: they start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlx_flash.converters.convert", __name__])
    return context


def run(processes, src, dst, options, point=0, after_s=None):
    """(exit code, file operations) of a conversion in a process of its own."""
    counted = processes.Value("i", 0)
    process = processes.Process(target=child, args=(src, dst, options, point, counted))
    process.start()
    if after_s is not None:
        process.join(after_s)
        process.kill()
    process.join()
    return process.exitcode, counted.value


class Case:
    """A checkpoint, what its undisturbed conversion gives, and how long that takes."""

    def __init__(self, folder, processes, kind, **more):
        make, options = KINDS[kind]
        self.processes, self.folder = processes, folder
        folder.mkdir()
        self.src = make(folder / "model")
        self.options = options | more
        run(processes, self.src, folder / "first", options)  # imports what is lazy
        start = time.monotonic()
        code, self.points = self.convert(folder / "whole")
        self.took_s = time.monotonic() - start
        assert code == 0
        self.whole = files_of(folder / "whole")

    def convert(self, dst, **limits):
        src = shutil.copytree(self.src, dst.with_name("source"))  # it may be deleted
        if self.options.get("overwrite") and not dst.exists():
            shutil.copytree(self.folder / "first", dst)
        try:
            return run(self.processes, src, dst, self.options, **limits)
        finally:
            if not limits:
                shutil.rmtree(src)

    def killed(self, name, **limits):
        """Whether a conversion was killed; the next gave what it should in any case."""
        base = self.folder / name
        base.mkdir()
        dst = base / "flash"
        code, _ = self.convert(dst, **limits)
        assert code in (0, -signal.SIGKILL)
        if code and dst.exists():  # whole, and the old one or the new one
            assert (dst / "flash.json").exists() and not (dst / "work").exists()
            old = files_of(self.folder / "first")
            assert files_of(dst) in (self.whole, old)
        if code:
            # Killed when all was done, it would be told that its result exists.
            lock = base / "flash.mlx-flash-lock"
            done = dst.exists() and not lock.exists()
            if not done or self.options.get("overwrite"):
                code, _ = run(self.processes, base / "source", dst, self.options)
                assert code == 0
            assert files_of(dst) == self.whole
            if self.options.get("delete_source"):
                assert not list((base / "source").glob("*.safetensors"))
            assert {p.name for p in base.iterdir()} == {"source", "flash"}
            shutil.rmtree(base)
            return True
        shutil.rmtree(base)
        return False


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_a_few_points(tmp_path, processes, kind):
    case = Case(tmp_path / kind, processes, kind, delete_source=True)
    points = random.Random(0).sample(range(1, case.points + 1), 1)
    for point in [*points, case.points]:  # the last is the lock that goes
        assert case.killed(str(point), point=point)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_file_operation(tmp_path, processes, kind, capsys):
    more = {"delete_source": True, "overwrite": True}
    case = Case(tmp_path / kind, processes, kind, **more)
    for point in range(1, case.points + 1):
        assert case.killed(str(point), point=point), point
    with capsys.disabled():
        print(f"\n{kind}: killed at {case.points} of {case.points} operations, 0 wrong")


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, processes, capsys):
    cases = [Case(tmp_path / kind, processes, kind) for kind in KINDS]
    rng, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        case = cases[runs % len(cases)]
        runs += 1
        kills += case.killed(str(runs), after_s=rng.uniform(0, case.took_s))
    with capsys.disabled():
        print(f"\n{kills} kills at random moments, {runs} conversions, 0 wrong")


@pytest.mark.slow
def test_full_disks(tmp_path, monkeypatch, capsys):
    make, options = KINDS["block"]
    src = make(tmp_path / "model")
    whole = files_of(convert(src, tmp_path / "whole", **options))
    size = sum(map(len, whole.values()))
    # The check that looks at the free space first would refuse them all.
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40)
    )
    disk = tmp_path / "disk"
    disk.mkdir()
    full = 0
    for share in range(1, DISKS + 1):
        # Whole pages, and files that the result does not have, need more than its size.
        room = max(int(1.5 * size * share / DISKS) // 4096, 1) * 4096
        mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("no tmpfs may be mounted here")
        try:
            try:
                convert(src, disk / "flash", **options)
            except FlashError as error:
                full += 1
                assert "disk is full" in str(error) and "\n" not in str(error)
                assert not (disk / "flash").exists()
                assert not list(disk.rglob("*.part"))
            more = ["mount", "-o", "remount,size=64M", str(disk)]
            subprocess.run(more, check=True)
            if not (disk / "flash").exists():
                convert(src, disk / "flash", **options)
            assert files_of(disk / "flash") == whole
            assert [p.name for p in disk.iterdir()] == ["flash"]
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    with capsys.disabled():
        print(f"\n{DISKS} disks, {full} too small, 0 wrong")


@pytest.mark.parametrize("kind", KINDS)
def test_power_loss(tmp_path, monkeypatch, kind):
    """Before a name that counts appears, all that it stands for is on disk."""
    make, options = KINDS[kind]
    src = make(tmp_path / "model")
    partial, on_disk, checked = tmp_path / "flash.partial", {}, []
    fsync, replace, control = os.fsync, os.replace, fcntl.fcntl

    def state(path):
        """What an fsync of it covers: a file's bytes, or the names in a folder."""
        return frozenset(os.listdir(path)) if path.is_dir() else path.read_bytes()

    def watched_fsync(file):
        fsync(file)
        note_synced(file)

    def watched_fcntl(file, command, *more):
        result = control(file, command, *more)
        if command == getattr(fcntl, "F_FULLFSYNC", None):  # macOS
            note_synced(file)
        return result

    def note_synced(file):
        inode = os.fstat(file).st_ino
        for path in (partial, *partial.rglob("*")):
            if path.exists() and path.stat().st_ino == inode:
                on_disk[inode] = state(path)

    def lost(paths):
        return [p for p in paths if on_disk.get(p.stat().st_ino) != state(p)]

    def watched_replace(a, b):
        if str(a) == str(partial / "flash"):
            paths = [partial / "flash", *(partial / "flash").rglob("*")]
            assert not lost(paths)
            checked.append(b)
        elif str(b).endswith("progress.json"):
            files = [p for p in partial.rglob("*") if p.is_file()]
            assert not lost(files)
            checked.append(b)
        replace(a, b)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(fcntl, "fcntl", watched_fcntl)
    monkeypatch.setattr(os, "replace", watched_replace)
    convert(src, tmp_path / "flash", **options)
    assert len(checked) >= 4  # it began, two layers, the end
