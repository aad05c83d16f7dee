"""Memory that gives way: a budget that follows what the machine has to spare.

A thread looks at the machine twice a second and says what the budget should be. It
touches nothing itself: the model takes it over before its next call, that is, within
one token.
"""

import threading
from collections.abc import Callable

import mlx.core as mx

from . import pressure

# Bytes that there should be, or None to ask → those that there are, None if what was
# asked for before has not been looked at yet.
Want = Callable[[int | None], int | None]

LOOK_S = 0.5
# Shares of the machine's memory: below the first one memory is short, and so much is
# given that the second is there again. Above that it may be taken back.
SHORT, CALM = 0.05, 0.10
STEP = 1 / 16  # of the budget, which is given besides: others go on taking
CALM_LOOKS = 6  # in a row, before anything is taken back


class Elastic:
    """Says what a model's budget should be, by what others need.

    Args:
        total_bytes: The budget now, and the most that it will be again.
        least_bytes: Not below this.
        machine_bytes: Of memory; None asks the machine.
    """

    def __init__(
        self, total_bytes: int, least_bytes: int, machine_bytes: int | None = None
    ):
        self.total_bytes = self.most_bytes = total_bytes
        self.least_bytes = least_bytes
        self.machine_bytes = machine_bytes or pressure.machine_bytes()
        self._calm = 0

    def look(self, available_bytes: int, short: bool, used_bytes: int) -> int:
        """The budget that there should be.

        Args:
            used_bytes: What the model really takes, which may be less than its budget.
            available_bytes: What the machine has to spare.
            short: Whether its kernel says that memory is short.
        """
        total = self.total_bytes
        if short or available_bytes < SHORT * self.machine_bytes:
            self._calm = 0
            missing = int(CALM * self.machine_bytes) - available_bytes
            given = max(missing, 0) + int(STEP * total)
            least = min(self.least_bytes, total)
            self.total_bytes = max(min(total, used_bytes) - given, least)
            return self.total_bytes
        spare = available_bytes - int(CALM * self.machine_bytes)
        self._calm = self._calm + 1 if spare > 0 else 0
        if self._calm >= CALM_LOOKS and total < self.most_bytes:
            self.total_bytes = min(total + max(spare // 2, 1), self.most_bytes)
        return self.total_bytes


class Watch:
    """The thread that looks, until `stop` or until its model is gone.

    Args:
        elastic: Decides.
        want: A weak reference to what is told of a budget that there should be, and
            says which one there is. While it is looked at nothing shows in what the
            machine has to spare, and conversations may keep it from shrinking as far.
    """

    def __init__(self, elastic: Elastic, want: Callable[[], Want | None]):
        self._elastic = elastic
        self._want = want
        self._stopped = threading.Event()
        threading.Thread(
            target=self._run, name="mlx-flash elastic", daemon=True
        ).start()

    def stop(self) -> None:
        """End the thread; again does nothing."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(LOOK_S):
            want = self._want()
            if want is None:
                return
            if (kept := want(None)) is not None:
                used = mx.get_active_memory() + mx.get_cache_memory()
                facts = pressure.available_bytes(), pressure.is_short(), used
                self._elastic.total_bytes = kept
                if (total := self._elastic.look(*facts)) != kept:
                    want(total)
            del want  # it would keep the model's slots
