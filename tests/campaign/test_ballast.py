"""A run gives memory to a process that wants 40 % of all there is, and takes it back.

    python -m pytest tests/campaign/test_ballast.py -m slow -s

In a memory cgroup, which stands for a small machine. It takes root, or a folder of
cgroups that the user may write to; elsewhere the test is skipped. What the budget makes
of made-up pressure is in tests/memory/test_elastic.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import save_tokenizer
from stock_checkpoints import LLAMA, write_checkpoint

import mlx_flash

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("elastic_run.py")
CGROUPS = Path("/sys/fs/cgroup")
MB = 10**6
MACHINE = 750 * MB
BALLAST = MACHINE * 2 // 5
TOKENS = 900
WIDE = {
    "hidden_size": 512,
    "num_hidden_layers": 16,
    "intermediate_size": 3072,
    "num_attention_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}  # 340 MB
TAKE = f"""
import time
held = []
for _ in range({BALLAST // MB} // 10):
    held.append(b"1" * {10 * MB})
    time.sleep(1)
time.sleep(10)
"""


@pytest.fixture
def small_machine():
    """A cgroup with so little memory and no swap; what a process is begun with."""
    first = CGROUPS / "memory" if (CGROUPS / "memory").is_dir() else CGROUPS
    folder = first / f"mlx-flash-{os.getpid()}"
    limit = "memory.limit_in_bytes" if first != CGROUPS else "memory.max"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made: {error}")
    try:
        try:
            (folder / limit).write_text(str(MACHINE))
        except OSError as error:
            pytest.skip(f"no limit can be set in a memory cgroup: {error}")
        yield folder
    finally:
        folder.rmdir()


def begun(folder, *command):
    """A process in a cgroup from its first moment on."""

    def join():
        (folder / "cgroup.procs").write_text("0")

    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=join,
    )


@pytest.mark.slow
def test_a_run_gives_way_to_a_ballast(small_machine, tmp_path):
    source = write_checkpoint(tmp_path / "stock", LLAMA | WIDE)
    save_tokenizer(source)
    folder = mlx_flash.convert(source, tmp_path / "flash", progress=False, rank=0)
    swapped = psutil.swap_memory().sout
    run = begun(small_machine, SCRIPT, folder, "auto", TOKENS)
    ballast = None
    try:
        assert run.stdout.readline() == "began\n"
        ballast = begun(small_machine, "-c", TAKE)
        facts = json.loads(run.communicate()[0])
        ballast.communicate()
        assert ballast.returncode == 0
    finally:
        for process in (run, ballast):
            if process is not None and process.poll() is None:
                process.kill()
                process.communicate()
    assert run.returncode == 0
    assert psutil.swap_memory().sout == swapped
    budgets = [nbytes for _, nbytes in facts["resizes"]]
    print(f"\n{len(facts['tokens'])} tokens, {facts['usual'] / MB:.0f} MB at first;")
    print([(round(when, 1), round(n / MB)) for when, n in facts["resizes"]])
    assert min(budgets) < facts["usual"] == budgets[-1], "it came back"
    assert min(budgets) <= 0.85 * facts["usual"]
    assert f"the budget changed {len(budgets)} times" in facts["said"]
    assert [when for when, _ in facts["resizes"]] == sorted(
        when for when, _ in facts["resizes"]
    )
    count = len(facts["tokens"])
    alone = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), "60%", str(count)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    undisturbed = json.loads(alone.stdout.splitlines()[-1])
    assert undisturbed["resizes"] == [] and undisturbed["tokens"] == facts["tokens"]
