"""Measuring: every byte at most once, nothing left behind, doubts said aloud."""

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from machine_profile import PROFILE

from mlx_flash.cli import main
from mlx_flash.errors import FlashError
from mlx_flash.planning import kernels as rates
from mlx_flash.planning import machine, probe, reads
from mlx_flash.profile import load_profile
from mlx_flash.storage import direct_io


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A probe of a small file in a folder of its own, which multiplies little."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MLX_FLASH_PROFILE", raising=False)
    monkeypatch.setattr(probe, "FILE_BYTES", 24 << 20)
    monkeypatch.setattr(probe, "LEAST_BYTES", 24 << 20)
    monkeypatch.setattr(reads, "STRIPE", 1 << 18)
    monkeypatch.setattr(reads, "BLOCKS", (4096, 65536))
    monkeypatch.setattr(reads, "THREADS", (1, 4))
    monkeypatch.setattr(reads, "BUFFERED_BLOCKS", (65536,))
    monkeypatch.setattr(reads, "SEQUENTIAL_BYTES", 1 << 22)
    monkeypatch.setattr(rates, "measure_rates", lambda: list(PROFILE.rates))
    monkeypatch.setattr(rates, "memory_bytes_per_s", lambda: 1e10)
    monkeypatch.setattr(rates, "layer_s", lambda: 1e-4)
    monkeypatch.setattr(rates, "wait_costs", lambda: (3e-4, 2e-6))
    return tmp_path / "cache" / "mlx-flash"


def run(*args, code=0):
    result = CliRunner().invoke(main, ["probe", *map(str, args)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_no_byte_is_dealt_twice():
    stripes = [(file, n) for file in range(3) for n in range(40)]
    seen = set()
    for deal in reads.deals(stripes, 3, seed=1):
        for file, blocks in enumerate(deal.blocks):
            for block in blocks:
                start = int(block) * deal.block_bytes
                pages = range(start // 4096, (start + deal.block_bytes) // 4096)
                mine = {(file, page) for page in pages}
                assert len(mine) == deal.block_bytes // 4096
                assert not mine & seen
                seen |= mine
    total = len(stripes) * reads.STRIPE // 4096
    assert total / 2 < len(seen) <= total


def test_short_blocks_of_a_deal_are_never_neighbours():
    for deal in reads.deals([(0, n) for n in range(200)], 1, seed=1):
        gaps = np.diff(np.sort(deal.blocks[0]))
        if deal.block_bytes < reads.MERGE_BYTES:
            assert (gaps >= 2).all()


def test_what_is_read_through_the_page_cache_is_read_twice_and_nothing_else(
    quick, tmp_path, monkeypatch
):
    """Cold and warm are the same blocks, and direct reads meet none of them."""
    real, seen = reads._measure, {True: [], False: []}

    def note(files, sizes, deal, notes):
        point, done = real(files, sizes, deal, notes)
        blocks = [b for units in deal.blocks for b in units]
        pages = deal.block_bytes // 4096
        read = blocks[: done // deal.block_bytes]
        seen[notes is not None] += [
            {int(b) * pages + i for b in read for i in range(pages)}
        ]
        return point, done

    monkeypatch.setattr(reads, "_measure", note)
    monkeypatch.setattr(reads, "POINT_S", 60)
    probe.probe()
    cold, warm = seen[False]
    assert cold == warm and cold
    assert not cold & set().union(*seen[True])


def test_every_point_has_something_to_read():
    stripes = [(0, n) for n in range(probe.LEAST_BYTES // reads.STRIPE * 3 // 4)]
    cached = stripes[:: reads.BUFFERED_SHARE]
    direct = [stripe for i, stripe in enumerate(stripes) if i % reads.BUFFERED_SHARE]
    deals = list(reads.deals(direct, 1, seed=1))
    assert len(deals) == len(reads.BLOCKS) * len(reads.THREADS)
    deals += reads.deals(cached, 1, 1, reads.BUFFERED_BLOCKS, reads.THREADS[-1:])
    assert min(len(d.blocks[0]) for d in deals) > 0


def test_probe_measures_stores_and_leaves_nothing(quick):
    result = run("--json", "-q")
    data = json.loads(result.stdout)
    assert result.stderr == ""
    assert os.listdir(quick) == ["profile.json"]
    profile = load_profile()
    assert data["path"] == str(quick / "profile.json")
    assert {(p.block_bytes, p.threads) for p in profile.flash} == {
        (b, t) for b in (4096, 65536) for t in (1, 4)
    }
    for p in profile.flash:
        assert abs(p.bytes_per_s / p.reads_per_s - p.block_bytes) < 1e-6
    (buffered,) = profile.buffered
    assert (buffered.block_bytes, buffered.threads) == (65536, 4)
    assert buffered.cold_bytes_per_s > 0 and buffered.warm_bytes_per_s > 0
    assert profile.memory_bytes_per_s == 1e10
    assert (profile.wait_s, profile.launch_s) == (3e-4, 2e-6)
    assert "mlx-flash probe" in profile.source


def test_table_names_the_machine_and_the_doubt(quick, monkeypatch):
    monkeypatch.setattr(machine, "is_virtual", lambda: True)
    result = run()
    assert "Not surely cold: this is a virtual machine" in result.stdout
    assert "a wait for MLX      300 µs, an operation 2.0 µs" in result.stdout
    assert "4 KiB" in result.stdout and "in order" in result.stdout
    assert "64 KiB through the page cache, 4 at once: " in result.stdout
    assert f"kept in {quick / 'profile.json'}" in result.stderr
    assert load_profile().cold is False


def test_reads_that_are_not_direct_are_not_cold(quick, monkeypatch):
    monkeypatch.setattr(machine, "is_virtual", lambda: False)
    real = direct_io.open_uncached
    monkeypatch.setattr(
        "mlx_flash.storage.source.open_uncached",
        lambda path, direct: real(path, False),
    )
    profile = probe.probe()
    assert profile.cold is False and "no direct I/O" in profile.notes[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, FlashError, MemoryError])
def test_temporary_file_goes_whatever_happens(quick, monkeypatch, error):
    seen = []

    def fail(files, notes):
        seen.extend(files)
        assert files[0].stat().st_size == 24 << 20
        raise error

    monkeypatch.setattr(reads, "measure_flash", fail)
    with pytest.raises(error):
        probe.probe()
    assert seen and not list(quick.iterdir())


PROBE = """
import sys
from mlx_flash.planning import probe, reads

probe.FILE_BYTES = probe.LEAST_BYTES = 24 << 20

def measure(files, notes):
    print(files[0], flush=True)
    sys.stdin.read()

reads.measure_flash = measure
probe.probe()
"""


@pytest.fixture
def probing(quick):
    """probing(): a process that reads its temporary file, and that file."""
    processes = []

    def start():
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", PROBE]
        processes.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        return processes[-1], Path(processes[-1].stdout.readline().strip())

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_what_a_killed_probe_left_goes_with_the_next(quick, probing):
    killed, leftover = probing()
    _, used = probing()
    killed.kill()
    killed.wait()
    assert leftover.stat().st_size == used.stat().st_size == 24 << 20
    probe.probe()
    assert list(quick.iterdir()) == [used]


def test_a_file_that_is_not_locked_yet_stays(quick, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(bytes(1 << 20))
    quick.mkdir(parents=True)
    (quick / "probe-1.tmp").touch()
    (quick / "probe-2.tmp").write_bytes(b"left")
    run(tmp_path, code=1)  # too little to measure
    assert os.listdir(quick) == ["probe-1.tmp"]


def test_a_folder_is_read_and_not_written(quick, tmp_path):
    folder = tmp_path / "model" / "ffn"
    folder.mkdir(parents=True)
    for i in range(2):
        (folder / f"layer_{i}.safetensors").write_bytes(os.urandom(20 << 20))
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    run(tmp_path / "model", "-q")
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    assert os.listdir(quick) == ["profile.json"]


def test_refusals(quick, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(bytes(1 << 20))
    message = run(tmp_path, code=1).stderr
    assert message.startswith("Error: ") and "a measurement needs 25 MB" in message
    assert "is no folder" in run(tmp_path / "nothing", code=1).stderr


def test_too_full_a_disk(quick, monkeypatch):
    import shutil

    usage = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(probe.shutil, "disk_usage", lambda path: usage)
    assert "0.0 GB free" in run("-q", code=1).stderr
    assert not list(quick.iterdir())


def test_plot_without_matplotlib(quick, monkeypatch, tmp_path):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    message = run("--plot", tmp_path / "a.png", code=1).stderr
    assert message == (
        "Error: --plot needs matplotlib, which is not installed: "
        "pip install matplotlib\n"
    )
    assert not quick.exists()  # judged before anything is measured


def test_plot(quick, tmp_path):
    pytest.importorskip("matplotlib")
    run("--plot", tmp_path / "a.png", "-q")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "no name of a picture" in run("--plot", tmp_path / "a.txt", code=1).stderr
    path = tmp_path / "no" / "a.png"
    assert "There is no folder" in run("--plot", path, code=1).stderr


# What MLX does


def test_rates_are_of_real_products(monkeypatch):
    monkeypatch.setattr(rates, "DTYPES", ("float32",))
    monkeypatch.setattr(rates, "WIDTHS", (0, 4))
    monkeypatch.setattr(rates, "MAX_BYTES", 1 << 20)
    measured = rates.measure_rates(budget_s=60)
    assert {(r.kernel, r.bits) for r in measured} == {
        (kernel, bits) for kernel in rates.KERNELS for bits in (0, 4)
    }
    assert all(r.bytes_per_s > 0 and r.flops_per_s > 0 for r in measured)


@pytest.mark.parametrize("kernel", rates.KERNELS)
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("tokens", [1, 32])
def test_amounts_of_a_kernel(kernel, bits, tokens):
    """Bytes and values that one token goes through, counted from the products."""
    run, nbytes, values = rates.KERNELS[kernel](64, "float32", bits, tokens)
    expected = {"matmul": 64, "gathered": 128, "experts": 8 if tokens > 1 else 16}
    per_value = 4 if not bits else bits / 8 + 8 / rates.GROUP
    assert nbytes == expected[kernel] * rates.WIDTH * per_value
    assert values == expected[kernel] * rates.WIDTH
    shapes = {"matmul": 64, "gathered": rates.WIDTH, "experts": 8}
    assert run().shape[-1] == shapes[kernel] and run().shape[0] == tokens


def test_time_that_is_used_up_leaves_the_rest_out():
    assert len(rates.measure_rates(budget_s=0)) == 1


def test_bookkeeping_and_layers_cost_something():
    per_layer, per_slot = rates.cache_costs()
    assert per_layer >= 0 and per_slot >= 0 and per_layer + per_slot > 0
    assert rates.layer_s(2) > 0


def test_a_wait_is_what_evaluating_one_by_one_takes_longer(monkeypatch):
    """A clock that only evaluations move on: 5 s each, and 2 s to begin one."""
    now, evaluate = [0.0], mx.eval

    def passes(seconds):
        def call(x):
            now[0] += seconds
            evaluate(x)

        return call

    monkeypatch.setattr(rates.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(rates.mx, "eval", passes(5))
    monkeypatch.setattr(rates.mx, "async_eval", passes(2))
    wait_s, launch_s = rates.wait_costs()
    assert (wait_s, launch_s) == (3, 5 / rates.ROW)


def test_rows_are_multiplied_as_the_engine_does(monkeypatch):
    """Where they lie if there is a kernel for that; so the engine's own product."""
    seen = []
    for name in ("rows_into", "rows_out"):
        real = getattr(rates, name)
        monkeypatch.setattr(
            rates, name, lambda x, rows, real=real: seen.append(1) or real(x, rows)
        )
    rates.KERNELS["gathered"](64, "float32", 4, 1).once()
    assert len(seen) == 2


def test_cached_share_knows_what_was_dropped(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    path.read_bytes()
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    if direct_io.cached_share(path) is None:
        pytest.skip("this system does not say what it caches")
    assert direct_io.cached_share(path) == 1
    direct_io.drop_cached(path)
    if direct_io.cached_share(path) == 1:
        pytest.skip("this file system keeps what it has (tmpfs)")
    assert direct_io.cached_share(path) == 0
    empty = tmp_path / "empty"
    empty.touch()
    assert direct_io.cached_share(empty) is None
