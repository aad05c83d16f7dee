"""A file that changes while its model is in use: never the logits of another model.

What is asked afterwards is answered by the model that was loaded, or by a FlashError
that names the file. The change comes between two steps, or in the middle of one: after
a read has begun and before its first byte.
"""

import os
import random
import shutil
from collections import Counter
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
from faulty_disk import Disk, linux, make_folders, run_on_faulty_disk
from test_interruptions import (
    NEXT_STEP,
    PROMPT,
    STEP,
    Situation,
    Trial,
    Wrong,
    logits,
    make_prompt_cache,
)

from mlx_flash import FlashError
from mlx_flash.storage import native_reader


def others(path):
    """The file with other values of the same size."""
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    return content[:header] + content[header:][::-1]


def grow(path):
    with path.open("ab") as file:
        file.write(bytes(4096))


def replace(path):
    other = path.with_name("other")
    other.write_bytes(others(path))
    os.replace(other, path)


def rewrite(path):
    content = others(path)
    with path.open("r+b") as file:
        file.write(content)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


CHANGES = {
    "grown": grow,
    "touched": os.utime,
    "replaced": replace,
    "rewritten": rewrite,
    "cut": cut,
    "deleted": os.unlink,
}


def trials(folders, seed, share):
    """Counts of a share of all cases, in a process whose reads can be held."""
    disk, chance, counts, faults = Disk(), random.Random(seed), Counter(), []
    natives = {native_reader._reader is not None, False}
    for name, folder in folders.items():
        trial = Trial(name, folder)
        ways = trial.kind.slots, trial.kind.look_ahead, natives
        for slots, look_ahead, native in product(*ways):
            situation = Situation(slots, look_ahead, native, "")
            for change, within in product(CHANGES, [False, True]):
                if chance.random() >= share:
                    continue
                try:
                    change_and_ask(trial, situation, change, within, disk, counts)
                except Exception as error:
                    counts["wrong"] += isinstance(error, Wrong)
                    counts["stuck"] += not isinstance(error, Wrong)
                    faults.append(f"{error!r} {change} {within=} {situation} {name}")
    return {**counts, "faults": faults[:20]}


def change_and_ask(trial, situation, change, within, disk, counts):
    """Two calls before one of the model's files changes, and four from then on."""
    sound, counts["cases"] = trial.folder, counts["cases"] + 1
    own = Path(shutil.copytree(sound, Path(sound).with_name("changing")))
    trial.folder = own
    try:
        model = trial.load(situation)
        path = next(iter(model.flash.layers[1].slots.files))
        cache = make_prompt_cache(model)
        for tokens in (PROMPT, STEP):
            result = logits(model, tokens, cache)
        trial.compare((PROMPT, STEP), result)
        if within:
            moment = disk.during_the_next_read(lambda: CHANGES[change](path))
        else:
            CHANGES[change](path)
            moment = nullcontext()
        with moment:
            ask(trial, model, cache, (PROMPT, STEP, NEXT_STEP), path, counts)
        for _ in range(2):
            cache = make_prompt_cache(model)
            ask(trial, model, cache, (PROMPT,), path, counts)
        ask(trial, model, make_prompt_cache(model), (STEP,), path, counts)
        model.flash.close()
    finally:
        trial.folder = sound
        shutil.rmtree(own)


def ask(trial, model, cache, calls, path, counts):
    """The last of `calls`, on a cache that has seen the others."""
    try:
        result = logits(model, calls[-1], cache)
    except FlashError as error:
        if str(path) not in str(error):
            raise
        counts["refused"] += 1
        return
    trial.compare(calls, result)
    counts["right"] += 1


def judge(tmp_path, share):
    folders = make_folders(tmp_path)
    counts = run_on_faulty_disk(tmp_path, __name__, folders=folders, share=share)
    print(counts)
    assert not counts["faults"], counts
    assert counts["refused"] > 2 * counts["cases"], counts


@linux
def test_a_file_that_changes_is_refused_or_not_needed(tmp_path):
    judge(tmp_path, 0.05)


@linux
@pytest.mark.slow
def test_every_change_at_every_moment(tmp_path):
    judge(tmp_path, 1)
