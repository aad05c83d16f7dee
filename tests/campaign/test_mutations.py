"""Thousands of damaged folders: each gives one line or an answer, and never hangs.

A worker process with a limit of memory loads one damaged folder after the other and
runs one step. It is started anew when it dies or takes too long.
"""

import json
import selectors
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import save_tokenizer
from mutations import mutate
from test_interruptions import KINDS, make_folder

from mlx_flash.inspection import record

HANG_S = 60  # hundreds of times what a folder takes
CAMPAIGN = 700  # mutations of each of the five kinds of folders
SAMPLE = 5
# Seeds that once gave a traceback, a signal or a hang.
FAILED_ONCE: dict[str, list[int]] = {}
WORKER = Path(__file__).with_name("worker.py")


class Worker:
    """A process that judges folders, as often started anew as it dies."""

    def __init__(self, records):
        self.process = None
        self.records = records

    def judge(self, folder):
        """What the worker says, or {"kind": "signal"} or {"kind": "hang"}."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                cwd=WORKER.parents[2],
                env={
                    "PYTHONPATH": str(WORKER.parents[2]),
                    "PATH": "/usr/bin:/bin",
                    "MLX_FLASH_CACHE": str(self.records),
                },
            )
        self.process.stdin.write(json.dumps(str(folder)) + "\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(HANG_S):
                self.close()
                return {"kind": "hang", "text": ""}
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.close()
            return {"kind": "signal", "text": f"the process ended with {code}"}
        return json.loads(line)

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    worker = Worker(tmp_path_factory.mktemp("records"))
    yield worker
    worker.close()


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """The name of a kind, and the folder of a tiny model of it, with a tokenizer."""
    folder = make_folder(request.param, tmp_path_factory.mktemp("made"))
    save_tokenizer(folder)
    if request.param == "experts in place":
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return request.param, folder


def attack(worker, folder, seeds):
    """Count what becomes of the folder with each seed's damage; (counts, faults).

    Where digests are left out, some damage gives other logits; none of it may pass by
    default.
    """
    sound = worker.judge(folder)
    assert sound["kind"] == "answer" and not sound["noticed"], sound
    counts, faults = Counter(), []
    for seed in seeds:
        path, original, may_differ = mutate(folder, seed)
        try:
            found = worker.judge(folder)
        finally:
            path.write_bytes(original)
        kind = found["kind"]
        if kind == "answer":
            noticed = found.pop("noticed")
            same = found == {k: sound[k] for k in found}
            kind = "undamaged" if same else "other logits"
            if not same and not (may_differ and noticed):
                faults.append(f"seed {seed} ({path.name}): other logits")
        counts[kind] += 1
        if kind in ("traceback", "signal", "hang"):
            faults.append(f"seed {seed} ({path.name}): {kind} {found['text']}")
    assert worker.judge(folder) == sound  # what was damaged was mended
    return counts, faults


def run(worker, made, tmp_path, monkeypatch, seeds):
    name, source = made
    folder = Path(shutil.copytree(source, tmp_path / "damaged"))
    monkeypatch.setenv("MLX_FLASH_CACHE", str(worker.records))
    record(folder, lambda file: None)  # the tokenizer came after the conversion
    counts, faults = attack(worker, folder, seeds)
    print(f"{name}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))
    if faults:
        pytest.fail("\n".join([f"{len(faults)} faults", *faults[:20]]), pytrace=False)


def test_some_damaged_folders(worker, made, tmp_path, monkeypatch):
    seeds = [*FAILED_ONCE.get(made[0], []), *range(SAMPLE)]
    run(worker, made, tmp_path, monkeypatch, seeds)


@pytest.mark.slow
def test_many_damaged_folders(worker, made, tmp_path, monkeypatch):
    run(worker, made, tmp_path, monkeypatch, range(CAMPAIGN))
