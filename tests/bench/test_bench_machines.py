"""`bench machines`: a slow disk, ranks in processes of their own, and their table."""

import time

import psutil
import pytest

from mlx_flash.bench.machines import compare, models
from mlx_flash.bench.machines.disk import SlowReader, slowed
from mlx_flash.bench.machines.launch import free_ports, launch
from mlx_flash.errors import FlashError
from mlx_flash.storage.base_reader import ReadResult

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 512,
    "vocab_size": 128,
}


class Clock:
    """Time that passes only where somebody sleeps or says so."""

    now = 10.0

    def sleep(self, seconds):
        self.now += seconds


class Disk:
    """A reader that has everything at once: 100 bytes a batch."""

    direct = True

    def submit(self, source, units, slots, guess=False):
        return object()

    def wait(self, ticket):
        return ReadResult(bytes_read=100, reads=1, seconds=0.0)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def slow(clock):
    """50 bytes a second."""
    return SlowReader(Disk(), 50, lambda: clock.now, clock.sleep)


def test_a_batch_takes_as_long_as_the_slow_disk_needs(slow, clock):
    result = slow.wait(slow.submit(0, None, None))
    assert clock.now == 12.0 and result.seconds == 2.0
    assert slow.direct


def test_the_slow_disk_reads_while_something_else_is_done(slow, clock):
    ticket = slow.submit(0, None, None)
    clock.now += 1.5
    slow.wait(ticket)
    assert clock.now == 12.0
    ticket = slow.submit(0, None, None)
    clock.now += 5
    assert slow.wait(ticket).seconds == 5.0
    assert clock.now == 17.0


def test_the_slow_disk_brings_one_batch_after_the_other(slow, clock):
    first, second = (slow.submit(0, None, None) for _ in range(2))
    slow.wait(first)
    slow.wait(second)
    assert clock.now == 14.0


def test_readers_are_opened_slow():
    assert isinstance(slowed(lambda *args, **options: Disk(), 1e6)(32), SlowReader)


def rank(**figures):
    return {
        "bytes_read": 0,
        "hits": 0,
        "misses": 0,
        "waits": 8,
        "sums": 0,
        "sum_bytes": 0,
        "sum_s": 0.0,
        "slots": [5, 5],
        "peak_bytes": 7,
    } | figures


def found(ranks, seconds, sum_s):
    return {"ranks": ranks, "seconds": seconds, "sum_s": sum_s, "units": 40}


def test_a_row_by_hand():
    """4 tokens: one rank reads 80 MB, two read 12 and 20 MB."""
    alone = rank(bytes_read=80_000_000, hits=50, misses=50)
    single = [found([alone], [0.2] * 4, [0.0])]
    summed = {"sums": 8, "sum_bytes": 8 * 4096}
    pair = [
        rank(bytes_read=12_000_000, hits=40, misses=10, **summed),
        rank(bytes_read=20_000_000, hits=35, misses=15, **summed),
    ]
    rounds = [found(pair, [s] * 4, [0.004, 0.008]) for s in (0.1, 0.05, 0.3)]
    row = compare.row_of(compare.Case("blocks", 2), rounds, single)
    assert row.name == "blocks, 2 ranks"
    assert row.more["rank_mb"] == "3.0 to 5.0"
    assert row.bytes_per_token == 8_000_000
    assert row.more["rank_share"] == 0.25 and row.more["all_share"] == 0.4
    assert row.more["held_share"] == 0.5 and row.more["hit_rate"] == 0.75
    assert row.more["waits_per_token"] == row.more["sums_per_token"] == 2
    assert row.more["bytes_per_sum"] == 4096
    assert row.more["sum_ms"] == "1.0 to 2.0"
    assert row.more["ms"] == "100 (50 to 300)"
    assert row.more["tokens_per_s"] == pytest.approx(10)
    assert row.more["speed_up"] == pytest.approx(2)


def test_one_rank_has_no_sums_and_may_read_nothing():
    single = [found([rank()], [0.2] * 4, [0.0])]
    row = compare.row_of(compare.Case("experts", 1), single, single)
    assert row.name == "experts, 1 rank"
    for absent in ("sums_per_token", "bytes_per_sum", "hit_rate"):
        assert row.more[absent] is None
    assert row.more["speed_up"] == 1 and "rank_share" not in row.more


def test_a_slow_disk_is_said_to_be_synthetic():
    case = compare.Case("blocks", 2, 50_000_000)
    assert case.name == "blocks, 2 ranks, SYNTHETIC disk of 50 MB/s each"


@pytest.mark.parametrize("option", [{"disk_rate": "50%"}, {"memory": "auto"}])
def test_what_is_no_rate_and_no_memory_is_refused(option, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "BLOCKS", models.BLOCKS | SMALL)
    with pytest.raises(FlashError, match="Try --"):
        compare.run(tmp_path, kind=("blocks",), **option)


SCRIPT = """
import os, pathlib, sys, time
rank = os.environ.get("MLX_RANK", "0")
pathlib.Path(f"{rank}.pid").write_text(str(os.getpid()))
if rank == "1":
    sys.exit("Error: Rank 1 has no disk.")
print("Error: Rank 1 ended unexpectedly. All ranks stop.", flush=True)
time.sleep(600)
"""


def are_gone(folder):
    """Whether no process that wrote its id there runs any more."""
    pids = [int(file.read_text()) for file in folder.glob("*.pid")]
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = [pid for pid in pids if psutil.pid_exists(pid)]
        if all(psutil.Process(p).status() == psutil.STATUS_ZOMBIE for p in left):
            return bool(pids)
        time.sleep(0.1)
    return False


@pytest.fixture
def script(tmp_path, monkeypatch):
    (tmp_path / "broken_rank.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)  # where `python -m` looks first
    return "broken_rank"


def test_a_rank_that_fails_ends_all_in_one_line(script, tmp_path):
    with pytest.raises(FlashError, match=r"^Rank 1 has no disk\.$"):
        launch(2, {}, 60, script)
    assert are_gone(tmp_path)


def test_a_rank_that_hangs_is_stopped(script, tmp_path):
    with pytest.raises(FlashError, match="did not end in 2 s"):
        launch(1, {}, 2, script)
    assert are_gone(tmp_path)


def test_a_rank_that_ends_without_a_word_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "silent_rank.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FlashError, match="exit 0"):
        launch(1, {}, 60, "silent_rank")


def test_ports_side_by_side():
    assert 1024 < free_ports(4) < 65000


def test_a_rank_that_cannot_load_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "BLOCKS", models.BLOCKS | SMALL)
    report = compare.run(tmp_path, ("blocks",), (1,), "1000B", rounds=1)
    assert "needs at least --memory" in report.rows[0].more["error"]
    assert "needs at least" in report.markdown()


@pytest.mark.slow  # 4 runs, of which 2 have two ranks that keep a core busy each
def test_two_ranks_read_half_each_and_a_slow_disk_takes_its_time(tmp_path, monkeypatch):
    wide = SMALL | {"intermediate_size": 4096}
    monkeypatch.setattr(models, "BLOCKS", models.BLOCKS | wide)
    report = compare.run(
        tmp_path,
        ("blocks",),
        (1, 2),
        "60%",
        prompt_tokens=4,
        warm_up=2,
        tokens=4,
        rounds=1,
        disk_rate="20MB",
    )
    assert not report.errors(), report.markdown()
    single, pair, slow_single, slow_pair = report.rows
    assert pair.more["rank_share"] <= 0.5 and pair.more["all_share"] < 1
    assert pair.more["sums_per_token"] == 2  # one a layer
    assert pair.more["bytes_per_sum"] == 64 * 4
    assert slow_single.bytes_per_token == single.bytes_per_token
    assert slow_pair.bytes_per_token == pair.bytes_per_token
    # Not a speed: the least time in which the slow disk can bring so many bytes.
    least_ms = 1e3 * slow_single.bytes_per_token / 20e6
    assert slow_single.more["ms_per_token"] >= 0.9 * least_ms
    assert "SYNTHETIC" in slow_pair.name and "SYNTHETIC" in report.notes[-1]
