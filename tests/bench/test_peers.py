"""`bench peers`: processes that limit memory and processes that are measured."""

import subprocess
import sys

import psutil
import pytest

from mlx_flash import FlashError
from mlx_flash.bench import opt, process
from mlx_flash.bench.peers import ballast, compare, program

SHAPE = opt.Shape(3, 128, 2048, heads=2, vocab=96, positions=512, dtype="float32")
SMALL = {"shape": "3x128x2048", "vocab": 96, "dtype": "float32"}


def children(module) -> list[psutil.Process]:
    """Processes of ours that run `module`; others may have been left by other tests."""
    ours = psutil.Process().children()
    return [process for process in ours if module.__name__ in process.cmdline()]


def child() -> psutil.Process:
    (process,) = children(ballast)
    return process


def test_ballast_holds_and_ends_on_ctrl_c():
    with pytest.raises(KeyboardInterrupt):
        with ballast.hold_back(30_000_000):
            process = child()
            assert process.memory_info().rss > 30_000_000
            raise KeyboardInterrupt
    assert not process.is_running()


def test_ballast_ends_with_whoever_started_it():
    command = [sys.executable, "-m", ballast.__name__, "4096"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout.readline().strip() == ballast.READY
        process.stdin.close()
        assert process.wait(20) == 0


def test_a_ballast_that_was_ended_spoils_the_result():
    with pytest.raises(FlashError, match="memory was not limited"):
        with ballast.hold_back(4096):
            process = child()
            process.kill()
            psutil.wait_procs([process])


def test_memory_that_is_not_there_is_refused():
    with pytest.raises(FlashError, match="are to be left free"):
        with ballast.limited_memory(10**15):
            pass


def test_peer_counts_tokens_after_the_warm_up(tmp_path):
    folder = opt.flash_folder(tmp_path, SHAPE, "50%")
    job = {
        "path": str(folder),
        "budget_bytes": SHAPE.nbytes // 2,
        "predictor": False,
        "prompt_tokens": 4,
        "warm_up": 2,
        "tokens": 3,
    }
    found = program.run("mlx_flash", job)
    assert len(found["seconds"]) == len(found["bytes_read"]) == 3
    assert found["peak_bytes"] > 0 and found["load_s"] > 0


def test_programs_that_cannot_run_say_why(tmp_path, monkeypatch):
    mine = compare.PEERS[0]
    absent = compare.Peer("other", "other", "no_such_package", mine.file)
    too_big = compare.Peer("big", "mlx_lm", "mlx_lm", mine.file, resident=True)
    monkeypatch.setattr(compare, "PEERS", [mine, absent, too_big])
    monkeypatch.setattr(compare, "PROCESS_BYTES", 10**15)
    options = {"tokens": 2, "prompt_tokens": 4, "ballast": False}
    report = compare.run(folder=tmp_path, **SMALL, **options)
    ran, missing, big = report.rows
    assert ran.tokens == 2 and ran.more["slower"] == 1
    assert "not installed" in missing.more["error"]
    assert "do not fit" in big.more["error"]
    assert "memory was NOT limited" in report.markdown()


def test_a_program_that_fails_says_why_in_a_line(tmp_path):
    job = {"path": str(tmp_path), "budget_bytes": 1, "predictor": False}
    job |= {"prompt_tokens": 1, "warm_up": 0, "tokens": 1}
    with pytest.raises(FlashError, match="^/.* is not a flash folder"):
        compare.run_program("mlx_flash", job)


def test_files_of_a_program_are_removed_after_it(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr(compare, "PEERS", [compare.PEERS[0], compare.PEERS[2]])
    row = {"seconds": [0.1], "bytes_read": [1], "peak_bytes": 1}
    monkeypatch.setattr(compare, "run_program", lambda *_: dict(row))
    compare.run(folder=tmp_path, **SMALL, ballast=False)
    assert [p.name for p in tmp_path.iterdir()] == ["opt-flash"]


@pytest.mark.parametrize("memory", ["auto"])
def test_a_share_is_needed(memory, tmp_path):
    with pytest.raises(FlashError, match="Try --memory 50%"):
        compare.run(folder=tmp_path, **SMALL, memory=memory)


def test_a_program_ends_when_the_ballast_gives_way(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "WATCH_S", 0.05)

    def gone():
        raise FlashError("gave way")

    with pytest.raises(FlashError, match="gave way"):
        compare.run_program("mlx_flash", {}, gone)
    assert not children(program)


def test_only_the_programs_that_were_asked_for(tmp_path, monkeypatch):
    row = {"seconds": [0.1], "bytes_read": [1], "peak_bytes": 1}
    monkeypatch.setattr(compare, "run_program", lambda *_: dict(row))
    options = {"ballast": False, "only": ("accelerate",)}
    report = compare.run(folder=tmp_path, **SMALL, **options)
    assert [row.name for row in report.rows] == ["accelerate, disk offload"]
