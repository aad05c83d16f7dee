"""Whether reading early pays, found out while the model runs."""

import time
from statistics import median

TURN = 8  # tokens in a row with reading early, or without
TURNS = 4  # of a trial: without, with, without, with
LONG = 512  # tokens until the next trial
WORTH = 0.95  # of the time of a token, at most, for it to go on


class Trial:
    """Tokens by turns with and without; the faster way is kept for a while.

    The median counts, so that a pause between two tokens does not. A trial is short
    beside what comes after it, so a wrong one costs little.

    Attributes:
        on: Whether to read early now.
    """

    def __init__(self) -> None:
        self.on = False
        self._since: float | None = None
        self._token = 0
        self._seconds: dict[bool, list[float]] = {False: [], True: []}

    def next_token(self) -> None:
        """A token begins, and the one before it has ended."""
        now = time.perf_counter()
        if self._since is not None and self._token < TURN * TURNS:
            self._seconds[self.on].append(now - self._since)
        self._since = now
        self._token += 1
        if self._token < TURN * TURNS:
            self.on = bool(self._token // TURN % 2)
        elif self._token == TURN * TURNS:
            self.on = self._pays()
        elif self._token >= LONG:
            self._begin_anew()

    def _pays(self) -> bool:
        without, early = (median(self._seconds[on]) for on in (False, True))
        return early < WORTH * without

    def _begin_anew(self) -> None:
        self.on, self._token = False, 0
        self._seconds = {False: [], True: []}
