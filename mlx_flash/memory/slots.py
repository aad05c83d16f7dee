"""One layer's units in memory: slots that flash is read into and MLX multiplies from.

The slots' memory is `held.Held`; the reader writes to it while MLX computes from it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..errors import FlashError
from ..storage.identity import Identities
from ..storage.manifest import Layer
from ..storage.reader import Reader, Region, Ticket
from .asked import Asked, NotCounted
from .early import Early, begin_early
from .fence import Fence, begin, evaluate
from .held import Held, allocate_held, resized_held
from .policies import Lru
from .slot_cache import SlotCache, Wave
from .stats import Stats

CLOSED = "This model was closed. Load it again to use it."

Total = TypeVar("Total")
# Told of every step: the units it asks for, its tokens, the units it wants kept, and
# how soon each unit of the layer is expected.
Listener = Callable[[np.ndarray, int, np.ndarray | None, np.ndarray | None], None]


class UnitSlots:
    """The slots of one FFN.

    A step (`run`) owns everything between asking for units and having multiplied them:
    waves, reads, waiting, and that no slot is read into before it was used. Wherever an
    exception stops it, the next step finds out what arrived and goes on from there.

    Attributes:
        listener: Told of every step, or None.
        asked: How often each unit was asked for. A layer held whole asks for none.
        files: What is read, which must not change.
    """

    def __init__(
        self,
        layer: Layer,
        extents: Sequence[Region],
        n_slots: int,
        policy: Lru,
        reader: Reader,
        fence: Fence,
        stats: Stats,
        apart: float = 0.0,
        stored: np.ndarray | None = None,
        rows: bool = False,
    ):
        self.listener: Listener | None = None
        self.asked = (NotCounted if rows else Asked)(layer.units)
        self.stats = stats
        self._count = stats.count_rows if rows else stats.count_units
        self._layer = layer
        cache = SlotCache(layer.units, n_slots, policy, apart)
        self._held = allocate_held(layer, cache)
        self._reader = reader
        self._fence = fence
        self._source = reader.add_source(extents, self._held.views, layer.units, stored)
        self.files = Identities(extent.path for extent in extents)
        self._early: Early | None = None
        self._in_step = False  # still True when a step begins: the last one stopped
        self._closed = False
        # Stands for these slots, without holding them: the fence outlives them.
        self._owner = object()

    @property
    def cache(self) -> SlotCache:
        """Which unit is in which slot."""
        return self._held.cache

    @property
    def parts(self) -> dict[str, mx.array]:
        """The MLX array of each part, by name, `[n_slots, *shape]`."""
        return self._held.parts

    @property
    def units(self) -> int:
        return self._layer.units

    @property
    def n_slots(self) -> int:
        return len(self.cache.unit_of)

    @property
    def holds_all(self) -> bool:
        """Whether every unit is in the slot of its own number, for good."""
        return self._held.whole

    def read_all(self) -> None:
        """Fill slots that have room for every unit, unit i in slot i.

        Raises:
            FlashError: If a read fails. Steps then go on reading what is missing.
        """
        self.run(np.arange(self.units), lambda total, wave: None)
        if not np.array_equal(self.cache.unit_of, np.arange(self.units)):
            raise RuntimeError("units are not in the slots of their numbers")
        self._held = replace(self._held, whole=True)

    def resize(self, n_slots: int, spare_bytes: int) -> None:
        """Have another number of slots; what ranks highest stays in memory.

        Part by part, and the old slots of a part go before the new ones come, so that
        nothing is there twice. What stays of a part lies in `spare_bytes` meanwhile:
        what does not fit is read again.

        Raises:
            FlashError: If the model was closed, or if a layer that is to be held whole
                cannot be read.
        """
        with self._fence.lock:
            if self._closed:
                raise FlashError(CLOSED)
            whole = n_slots == self.units
            if n_slots == self.n_slots and whole == self.holds_all:
                return
            self._begin_step()
            self._reader.drain()
            self._fence.settle()
            self._early = None
            self.cache.recover()
            for held in resized_held(self._layer, self._held, n_slots, spare_bytes):
                self._have(held)
            self._in_step = False
            if whole:
                self.read_all()

    def _have(self, held: Held) -> None:
        self._held = held
        self._reader.move_source(self._source, held.views)

    def run(
        self,
        units: np.ndarray,
        multiply: Callable[[Total | None, Wave], Total],
        tokens: int = 1,
        keep: np.ndarray | None = None,
        meanwhile: Callable[[], None] | None = None,
        finish: Callable[[Total], Any] | None = None,
        soon: np.ndarray | None = None,
    ) -> Any:
        """Bring `units` in waves, and fold `multiply` over the waves.

        Args:
            units: int array of unit ids, sorted, unique.
            multiply: (total so far, None at first; a wave whose units are there) → the
                new total: an array or a list of arrays that holds everything computed
                from slots so far. The next wave is read meanwhile where slots allow it.
            tokens, keep: As `SlotCache.waves` takes them.
            meanwhile: Called once, when the first wave is there.
            soon: How soon each unit of the layer is expected, as the policy takes it.
            finish: The last total → what is made of all of it, and returned. The total
                itself can go then: a model holds nothing but the latest result.

        Returns:
            The last total, finished; None if no unit was asked for.

        Raises:
            FlashError: If a read fails, or a file changed since the model was loaded.
        """
        with self._fence.lock:
            if self._closed:
                raise FlashError(CLOSED)
            if self.listener is not None:
                self.listener(units, tokens, keep, soon)
            self.asked.count(units)
            self._begin_step()
            if self._early is not None:
                self._early = self._early.counted(units, self.stats)
            if soon is not None:
                self.cache.policy.expect(soon)
            waves = self.cache.waves(units, tokens, keep)
            result = self._fold(waves, multiply, meanwhile)
            self._finish_early()  # what was guessed wrongly
            if finish is not None and result is not None:
                result = finish(result)
            self._fence.hold(result, self._owner)
            self._in_step = False
            return result

    def _fold(
        self,
        waves: Iterator[Wave],
        multiply: Callable[[Total | None, Wave], Total],
        meanwhile: Callable[[], None] | None,
    ) -> Total | None:
        total: Total | None = None
        wave, ticket = self._submit_next(waves, total)
        while wave is not None:
            self._await(wave, ticket)
            if meanwhile is not None:
                meanwhile()
                meanwhile = None
            if wave.ahead:
                following = self._submit_next(waves, total)
                total = multiply(total, wave)
                begin(total)
            else:
                total = multiply(total, wave)
                following = self._submit_next(waves, total)
            wave, ticket = following
        return total

    def wait_for(self, *choices: Any) -> None:
        """Have the choice of units computed: the host must know what to read.

        The one point of a step at which MLX has nothing else to do meanwhile.
        """
        evaluate(*choices)
        self.stats.waits += 1

    def read_early(self, units: np.ndarray, likely: np.ndarray | None = None) -> None:
        """Begin to read what the next step will probably ask for.

        A wrong guess costs reads and slots, never correctness; so does a failed read,
        which is left to `run` to meet again.

        Args:
            units: int array of unit ids, sorted, unique.
            likely: How likely it will ask for each unit of the layer: what is less
                likely makes room first.
        """
        with self._fence.lock:
            busy = self._early is not None or self._in_step
            if busy or self._closed or self.holds_all:
                return
            self._in_step = True
            self._fence.settle(self._owner)
            self._early = begin_early(
                units, likely, self.cache, self._reader, self._source, self.stats
            )
            self._in_step = False

    def close(self) -> None:
        """Refuse further steps."""
        self._closed = True

    def _begin_step(self) -> None:
        """Resolve whatever an exception left of the last step."""
        if self._in_step:
            self._reader.drain()
            self._fence.settle()
            mx.synchronize()  # nobody holds what the last step had begun to compute
            self._early = None
            self._held.clear(self.cache.recover())
            self._have(replace(self._held, whole=False))
        self._in_step = True

    def _finish_early(self, slots: np.ndarray | None = None) -> None:
        """Wait for what `read_early` began, if it reads into some of `slots`."""
        early = self._early
        if early is not None and (slots is None or early.uses(slots)):
            self._early = None
            early.finish(self._reader, self._source, self._held, self.files, self.stats)

    def _submit_next(
        self, waves: Iterator[Wave], total: object
    ) -> tuple[Wave | None, Ticket | None]:
        """The next wave, its reads under way; `total` was computed from slots."""
        stats = self.stats
        since = time.perf_counter()
        wave = next(waves, None)
        stats.cache_s += time.perf_counter() - since
        if wave is None:
            return None, None
        self._count(len(wave.units), len(wave.missing))
        if total is not None:
            evaluate(total)  # also before a wave of hits: it would pile up in memory
            stats.waits_for_slots += 1
        if not len(wave.missing):
            return wave, None
        self._finish_early(wave.missing_slots)  # one slot is not read into twice
        self._fence.settle(self._owner)
        since = time.perf_counter()
        ticket = self._reader.submit(self._source, wave.missing, wave.missing_slots)
        stats.io_s += time.perf_counter() - since
        return wave, ticket

    def _await(self, wave: Wave, ticket: Ticket | None) -> None:
        """Wait for a wave's reads, also for those that were begun on a guess."""
        self._finish_early(wave.slots)
        if ticket is None:
            return
        since = time.perf_counter()
        result = self._reader.wait(ticket)
        self.files.check()
        self.cache.arrived(wave.missing_slots)
        self.stats.io_s += time.perf_counter() - since
        self.stats.count(result)
