"""Ctrl-C, as the system sends it, at random moments of a process that generates.

Afterwards the same process gives what it gave before. A signal that ends in no
exception was swallowed: Python drops what is raised in finalizers and callbacks.
"""

import os
import random
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest
from conftest import save_tokenizer
from faulty_disk import linux, make_folders, run_on_faulty_disk
from stock_checkpoints import stream
from test_interruptions import KINDS, PROMPT, STEP, logits, make_prompt_cache, talk

import mlx_flash
from mlx_flash.loading import load_tokenizer
from mlx_flash.storage import native_reader

TOKENS = 20
LONGEST_S = 0.15  # until the signal comes: some come after the last token
WAIT_S = 1.0  # for a signal that was sent and not noticed


def trials(folder, name, native, signals, seed):
    """What becomes of `signals` signals, in a process of its own."""
    # A shell's background processes are born with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chance, counts = random.Random(seed), Counter()
    tokenizer = load_tokenizer(Path(folder))
    look_ahead = KINDS[name].look_ahead[-1]
    options = {"look_ahead": look_ahead, "native": native, "skip": KINDS[name].skip}
    model = stream(folder, KINDS[name].slots[0], **options)
    right = answer(model, tokenizer)
    expected = talk(model, (PROMPT, STEP))[1]
    for _ in range(signals):
        counts[interrupt(model, tokenizer, chance.uniform(0, LONGEST_S))] += 1
        cache = make_prompt_cache(model)
        logits(model, PROMPT, cache)
        found = logits(model, STEP, cache)
        difference = abs(found - expected).max() / abs(expected).max()
        counts["wrong"] += not difference <= KINDS[name].tolerance
        counts["wrong"] += answer(model, tokenizer) != right
    model.flash.close()
    return counts


def answer(model, tokenizer):
    return [r.token for r in generation(model, tokenizer)]


def generation(model, tokenizer):
    return mlx_flash.stream_generate(model, tokenizer, list(PROMPT[0]), TOKENS)


def interrupt(model, tokenizer, after_s):
    """Generates until a signal comes; says whether it was heard."""
    sent = threading.Event()

    def send():
        os.kill(os.getpid(), signal.SIGINT)
        sent.set()

    timer = threading.Timer(after_s, send)
    try:
        timer.start()
        while not sent.is_set():
            for _ in generation(model, tokenizer):
                pass
        sent.wait(WAIT_S)
    except KeyboardInterrupt:
        return "heard"
    finally:
        timer.join()
    return "swallowed"


def judge(base, signals):
    """Send so many signals to each kind with each reader; the disk is a sound one."""
    total = Counter()
    for name, folder in make_folders(base).items():
        save_tokenizer(Path(folder))
        for native in {native_reader._reader is not None, False}:
            case = dict(folder=folder, name=name, native=native, signals=signals)
            counts = Counter(run_on_faulty_disk(base, __name__, **case))
            print(f"{name}, {native=}: {dict(counts)}")
            total += counts
    print(dict(total))
    assert not total["wrong"], total
    assert total["heard"] + total["swallowed"] >= 10 * signals
    assert total["swallowed"] < 0.1 * total["heard"]


@linux
@pytest.mark.slow
def test_after_ctrl_c_the_same_process_answers_right(tmp_path):
    judge(tmp_path, 20)
