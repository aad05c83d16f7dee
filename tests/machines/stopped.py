"""Stop in the middle of what ranks do together, and go on."""

import os
import signal
import sys
import threading
import time

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

import mlx_flash

FOLDER = sys.argv[1]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have ignored it


class Left(Exception):
    """As a server's worker has it, when nobody waits for an answer any more."""


def load():
    return mlx_flash.load(FOLDER, memory=2_600_000, context=512)


def call(model, tokens, cache=None):
    mx.eval(model(mx.array(tokens), cache=cache))


def same(model) -> bool:
    return bool(mx.array_equal(model(mx.array([[3, 4, 5]])), expected))


def load_in_thread() -> None:
    try:
        load()
        print("a thread has loaded")
    except mlx_flash.FlashError as error:
        print(error)


for _ in range(2):
    thread = threading.Thread(target=load_in_thread)
    thread.start()
    thread.join()
model, tokenizer = load()
expected = model(mx.array([[3, 4, 5]]))

thread = threading.Thread(target=load_in_thread)
thread.start()
thread.join()

for shape in (1, 0), (2, 0), (0, 3):
    try:
        call(model, mx.zeros(shape, mx.int32), make_prompt_cache(model))
    except mlx_flash.FlashError:
        print("no tokens are refused", same(model))


def note(done: int, total: int) -> None:
    if 0 < done < total:
        raise Left


try:
    for _ in mlx_flash.stream_generate(
        model, tokenizer, [3, 4, 5] * 130, 3, prompt_progress_callback=note
    ):
        pass
except Left:
    print("a prompt nobody waits for is left", same(model))


def interrupt(enough: threading.Event) -> None:
    """Ctrl-C until one came through: Python drops what comes in a finalizer."""
    while not enough.wait(0.2):
        os.kill(os.getpid(), signal.SIGINT)


def interrupted_report() -> None:
    enough = threading.Event()
    thread = threading.Thread(target=interrupt, args=(enough,))
    thread.start()
    try:
        while True:
            model.flash.report()
    except KeyboardInterrupt:
        enough.set()
        thread.join()


for _ in range(3):
    try:
        interrupted_report()
    except KeyboardInterrupt:  # one more, while the first was being handled
        pass
    print("a report is interrupted", same(model))


def calls() -> None:
    try:
        while True:
            call(model, [[5, 6, 7] * 20], make_prompt_cache(model))
    except mlx_flash.FlashError as error:
        print("closed in between:", error)


thread = threading.Thread(target=calls)
thread.start()
time.sleep(0.3)
model.flash.close()
thread.join()
try:
    call(model, [[3]])
except mlx_flash.FlashError as error:
    print("closed before:", error)
model, _ = load()
print("loaded again", same(model))
