"""Checkpoints of more shards than a process may have open files."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from mlx.utils import tree_flatten
from stock_checkpoints import QWEN3, make_weights, save

from mlx_flash.errors import FlashError
from mlx_flash.storage import open_files

SHARDS = 300
TESTS = Path(__file__).parents[1]
LOAD = """
import resource, sys
import mlx_lm  # which sets limits of its own
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
import mlx_flash
with mlx_flash.load_model(sys.argv[1], "100%") as (model, _):
    pass
"""
# A hard limit of 256, as somebody meets it who may not raise it.
REFUSE = """
import resource
def refuse(which, limits):
    if limits[1] > 256:
        raise ValueError("not allowed to raise maximum limit")
resource.setrlimit = refuse
resource.getrlimit = lambda which: (256, 256)
"""


def python(script, *args):
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)


def test_300_shards_are_loaded_where_256_files_are_allowed(tmp_path):
    config = QWEN3 | dict(num_hidden_layers=SHARDS // 10)
    weights = dict(tree_flatten(make_weights(config).parameters()))
    shards = [{name: array} for name, array in weights.items()]
    assert len(shards) > SHARDS
    folder = save(tmp_path / "shards", config, *shards)
    done = python(LOAD, folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "script",
    [
        "import mlx_flash\ntry:\n mlx_flash.load_model\n"
        "except mlx_flash.FlashError as error:\n exit(f'Error: {error}')",
        "from mlx_flash.cli import main\nmain(['generate', 'Hello'])",
    ],
    ids=["Python", "command"],
)
def test_too_low_a_hard_limit_is_one_line(script):
    done = python(REFUSE + script)
    assert done.returncode == 1
    assert done.stderr == (
        "Error: This process may have 256 files open, and mlx-lm wants 4,096. Allow "
        "them, if need be in a new shell: ulimit -n 4096\n"
    )


@pytest.fixture
def limits(monkeypatch):
    """limits(soft, hard) stands in for the system's; → what was set."""
    made = []

    def pretend(soft, hard):
        def set_limits(which, pair):
            if pair[0] > 10240 or hard != resource.RLIM_INFINITY and pair[1] > hard:
                raise ValueError("not allowed to raise maximum limit")
            made.append(pair)

        monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
        monkeypatch.setattr(resource, "setrlimit", set_limits)
        return made

    return pretend


def test_the_soft_limit_goes_up_to_the_hard_one(limits):
    made = limits(256, 4096)
    open_files.allow_open_files(300)
    assert made == [(4096, 4096)]


def test_nothing_is_set_where_files_are_allowed_already(limits):
    made = limits(2048, 4096)
    open_files.allow_open_files(300)
    assert made == []
    made = limits(resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    open_files.allow_open_files(300_000)
    assert made == []


def test_macos_takes_no_more_than_open_max(limits):
    """Its hard limit is infinity, and `setrlimit` refuses more than OPEN_MAX."""
    made = limits(256, resource.RLIM_INFINITY)
    open_files.allow_open_files(300)
    assert made == [(10240, resource.RLIM_INFINITY)]


def test_more_files_than_the_hard_limit(limits):
    limits(256, 280)
    have = len(os.listdir("/dev/fd"))
    with pytest.raises(FlashError) as error:
        open_files.allow_open_files(300)
    assert "280 files open" in str(error.value) and "300" in str(error.value)
    need = int(str(error.value).rpartition("ulimit -n ")[2])
    assert 300 + have - 5 <= need <= 300 + have + 100
