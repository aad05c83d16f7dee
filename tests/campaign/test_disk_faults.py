"""A bad disk: reads that fail, come short, end, are interrupted or late.

Logits are right, or a FlashError names the file, and then the same model goes on. A run
is a conversation of three calls.
"""

import random
from collections import Counter

import pytest
from faulty_disk import FAULTS, Disk, linux, make_folders, run_on_faulty_disk
from stock_checkpoints import stream
from test_interruptions import (
    NEXT_STEP,
    PROMPT,
    STEP,
    Situation,
    Trial,
    Wrong,
    logits,
    make_prompt_cache,
    talk,
)

from mlx_flash import FlashError
from mlx_flash.storage import native_reader

CALLS = PROMPT, STEP, NEXT_STEP
RUNS_OF_A_MODEL = 10
LIGHT = dict(failed=3, interrupted=100, short=100, ended=3, delayed=50)
HEAVY = dict(failed=40, interrupted=300, short=300, ended=20, delayed=20)


def trials(folders, runs, seed):
    """Counts of `runs` conversations, in a process with a faulty disk."""
    disk, chance, counts, faults = Disk(), random.Random(seed), Counter(), []
    kinds = {name: Trial(name, folder) for name, folder in folders.items()}
    for trial in kinds.values():
        calls = [CALLS[:n] for n in range(1, 4)]
        model = trial.load(Situation(trial.kind.slots[-1], False, False, ""))
        trial.expected |= {call: talk(model, call)[1] for call in calls}
        model.flash.close()
    while counts["runs"] < runs:
        trial = kinds[list(kinds)[counts["models"] % len(kinds)]]
        situation = {
            "native": native_reader._reader is not None and counts["models"] % 2 == 0,
            "look_ahead": chance.choice(trial.kind.look_ahead),
            "page_cache": chance.random() < 0.5,
            "skip": trial.kind.skip,
        }
        counts["models"] += 1
        model = load(trial, situation, disk, chance, counts)
        for _ in range(RUNS_OF_A_MODEL):
            try:
                converse(trial, model, disk, chance, counts)
            except Wrong as wrong:
                counts["wrong"] += 1
                faults.append(f"wrong {wrong}: {situation} of {trial.folder}")
            except Exception as error:
                counts["stuck"] += 1
                faults.append(f"{error!r}: {situation} of {trial.folder}")
        model.flash.close()
    return {**counts, **disk.counted(), "faults": faults[:20]}


def load(trial, situation, disk, chance, counts):
    """A model, loaded from a bad disk if that works, else from a sound one."""
    slots = chance.choice(trial.kind.slots)
    try:
        with disk.faults(**LIGHT):
            return stream(trial.folder, slots, **situation)
    except (FlashError, RuntimeError) as error:
        # Resident weights are read by MLX, which names no file.
        if str(trial.folder) not in str(error) and "[read]" not in str(error):
            raise
        counts["not loaded"] += 1
    return stream(trial.folder, slots, **situation)


def converse(trial, model, disk, chance, counts):
    """Three calls on a bad disk, and where one fails, what comes after it."""
    counts["runs"] += 1
    cache = make_prompt_cache(model)
    for n, tokens in enumerate(CALLS, 1):
        before = [entry.offset for entry in cache]
        counts["calls"] += 1
        try:
            with disk.faults(**chance.choice([LIGHT, HEAVY])):
                result = logits(model, tokens, cache)
        except FlashError as error:
            if str(trial.folder) not in str(error):
                raise
            counts["refused"] += 1
            if chance.random() < 0.5:
                break
            for entry, offset in zip(cache, before, strict=True):
                entry.trim(entry.offset - offset)
            result = logits(model, tokens, cache)  # the disk is sound again
        trial.compare(CALLS[:n], result)
    else:
        return
    trial.compare(CALLS[:2], talk(model, CALLS[:2])[1])


def judge(tmp_path, runs, seed):
    folders = make_folders(tmp_path)
    counts = run_on_faulty_disk(
        tmp_path, __name__, seed=seed, folders=folders, runs=runs
    )
    print(counts)
    assert not counts["faults"], counts
    assert counts["runs"] >= runs and counts["refused"] > runs / 10, counts
    assert all(counts[name] for name in FAULTS), counts


@linux
def test_a_bad_disk_gives_right_logits_or_an_error(tmp_path):
    judge(tmp_path, 80, 1)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4, 5])
def test_a_bad_disk_for_long(tmp_path, seed):
    judge(tmp_path, 1000, seed)
