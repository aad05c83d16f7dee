"""A rank that ends or hangs ends all of them, with a line that names it."""

import os
import random
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from conftest import save_tokenizer
from conftest import write_checkpoint as write_opt
from machines.launched import HERE, start

from mlx_flash.converters.convert import convert

LIMIT_S = 10  # from a rank's death to the end of the others
TOKENS = r"\.\.\.\."  # as the script prints them


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    opt = write_opt(folder / "opt", max_position_embeddings=9000)
    convert(opt, folder / "flash", unit="neuron", rank=0, progress=False)
    save_tokenizer(folder / "flash")
    return folder / "flash"


class Running:
    """Ranks that generate, what they print read as it comes."""

    def __init__(self, ranks: int, model: Path):
        self.process = start(ranks, HERE / "generating.py", model)
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while got := self.process.stdout.read(1):
            self.text += got

    def wait_for(self, pattern: str, timeout_s: float = 60) -> re.Match:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self._reader.is_alive():
            if found := re.search(pattern, self.text):
                return found
            time.sleep(0.05)
        raise AssertionError(self.text)

    def pid_of(self, rank: int) -> int:
        return int(self.wait_for(rf"rank {rank} is (\d+)")[1])

    def end(self) -> str:
        """All that was printed, when every rank has ended."""
        self._reader.join(LIMIT_S + 20)
        assert not self._reader.is_alive(), self.text
        self.process.wait()
        self.process.stdout.close()
        return self.text


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def lose(ranks: int, model: Path, victim: int, number: int, after_s: float) -> None:
    running = Running(ranks, model)
    pids = [running.pid_of(rank) for rank in range(ranks)]
    try:
        running.wait_for(TOKENS)
        time.sleep(after_s)
        os.kill(pids[victim], number)
        since = time.monotonic()
        others = [pid for pid in pids if pid != pids[victim]]
        while any(map(alive, others)) and time.monotonic() < since + LIMIT_S:
            time.sleep(0.05)
        assert not any(map(alive, others)), running.text
        if number == signal.SIGSTOP:
            os.kill(pids[victim], signal.SIGKILL)
        text = running.end()
    finally:
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
    # mlx.launch ends the others as well, sometimes before they have said why.
    ours = rf"Error: Rank {victim} \(.*\) (ended|has not answered)"
    launchers = rf"Node with rank {victim} exited with code -9"
    assert re.search(f"{ours}|{launchers}", text)
    assert "ended by itself" not in text
    assert "Traceback" not in text
    for rank in range(ranks):
        assert f"rank {rank} exited with code 0" not in text


def test_a_killed_rank_ends_the_other(model):
    lose(2, model, 1, signal.SIGKILL, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_rank_killed_at_any_moment_ends_the_others(model, seed):
    rng = random.Random(seed)
    ranks = rng.choice((2, 3))
    lose(ranks, model, rng.randrange(ranks), signal.SIGKILL, rng.uniform(0, 2))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_ends_the_others(model, victim):
    lose(2, model, victim, signal.SIGSTOP, 0.3)
