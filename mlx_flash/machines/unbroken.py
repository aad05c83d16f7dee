"""What several ranks do together goes on to its end, whatever happens to rank 0.

An exception in the middle would leave the others in a sum, or answers behind that
nobody asked for. So it comes when the others have done their part.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_interrupts() -> Iterator[None]:
    """Ctrl-C comes after what is done within."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda *args: came.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came and callable(before):
            before(*came[0])


@contextmanager
def told_in_peace(flash: Any) -> Iterator[None]:
    """What `flash.told_of_prompt` raises comes after the call that is made within.

    A server stops reading a prompt in this way, when nobody waits for the answer.
    """
    told = flash.told_of_prompt
    raised: list[BaseException] = []

    def note(tokens: int) -> None:
        if raised:
            return
        try:
            told(tokens)
        except BaseException as error:
            raised.append(error)

    flash.told_of_prompt = note
    try:
        yield
    finally:
        flash.told_of_prompt = told
    if raised:
        raise raised[0]
