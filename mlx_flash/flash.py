"""What a loaded model has besides what every model has: `model.flash`."""

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from .assembly import Assembled
from .draft_model import DraftModel
from .errors import FlashError
from .layers.base import FlashFFN, FromFlash
from .layers.kinds import UnitKind
from .memory.budget import Budget
from .memory.elastic import Elastic, Watch
from .memory.fence import Fence
from .memory.mlx_limits import LimitShare
from .memory.pool import Pool
from .memory.slots import CLOSED
from .memory.stats import Stats
from .memory_size import say_memory
from .run import RankReport, Run
from .run_report import RunReport
from .storage.in_use import hold, let_go
from .storage.manifest import Manifest
from .storage.reader import Reader


class Machines(Protocol):
    """What `machines.lead` and `machines.follow` do for a model."""

    def __call__(
        self,
        model: nn.Module,
        inputs: mx.array,
        cache: Sequence[Any] | None,
        run: Callable[[int], mx.array],
    ) -> mx.array: ...

    def resize(self, memory: int | float | str) -> int | float | str: ...

    def ranks(self, mine: Stats) -> list[RankReport]: ...

    def close(self) -> None: ...


class Flash:
    """What a loaded model has on flash, as `model.flash`.

    Attributes:
        folder, manifest, kind: Where it lies, what it is, and its unit kind.
        machines: Makes every call of the model on several machines; None on one.
        told_of_prompt: Is called with the tokens of a long call that are through.
        pool: How its memory is divided at the moment.
        layers: Its FFNs on flash.
        beside: What else is on flash: dense FFNs of a mixture, tables of embeddings.
        positions: How many the model has, None if it has no limit.
        shapes: What its size in memory depends on besides weights.
        vocabulary: Tokens it knows: ids from 0 on.
        stats: Counters since it was loaded.
        draft: The model that drafts for this one, if one was named.
        run: The last generation, for `report`.
        adapter: The digest of an adapter's weights, if one was applied.
        skip: The share of its neurons that each token leaves out.
        cached_share: Of the files on flash, what reads could find in memory when the
            model was loaded: 0 is cold, None unknown.
    """

    def __init__(
        self,
        parts: Assembled,
        folder: Path,
        budget: Budget,
        reader: Reader,
        draft: DraftModel | None = None,
    ):
        self.folder = folder
        self.manifest: Manifest = parts.manifest
        self.kind: UnitKind = parts.kind
        self.layers: list[FlashFFN] = parts.layers
        self.beside: Sequence[FromFlash] = parts.beside
        self.positions: int | None = parts.config.get("max_position_embeddings")
        self.shapes = parts.shapes
        self.vocabulary = parts.shapes.vocabulary
        self.stats = Stats()
        self.run: Run | None = None
        self.adapter: str | None = None
        self.skip = 0.0
        self.cached_share: float | None = None
        self.closed = False
        self.machines: Machines | None = None
        self.told_of_prompt: Callable[[int], None] = lambda tokens: None
        self._reader = reader
        self._fence = Fence()
        self.pool: Pool | None = None  # there once the layers have slots
        self._budget = budget
        self._watch: Watch | None = None
        self.draft = draft
        self.limits = LimitShare(budget.total_bytes, budget.cache_bytes)
        self._draft_limits = LimitShare(self.draft_bytes, 0)
        self._in_use = weakref.finalize(self, let_go, hold(folder))
        weakref.finalize(self, self._draft_limits.release).atexit = False
        weakref.finalize(self, self.limits.release).atexit = False

    def __repr__(self) -> str:
        facts, slots = self.manifest, self.budget.slots
        whole = sum(n == x.units for n, x in zip(slots, facts.layers, strict=True))
        given = self.budget.total_bytes + self.draft_bytes
        return (
            f"<Flash {self.folder.name}: {facts.model_type} of "
            f"{say_memory(facts.model_bytes)}, budget {say_memory(given)}, "
            f"{len(self.layers)} layers of {self.kind.name}s from flash, {whole} of "
            f"them held whole{', closed' if self.closed else ''}>"
        )

    @property
    def budget(self) -> Budget:
        """How its memory is divided, as a rule."""
        return self._budget if self.pool is None else self.pool.budget

    def resize(self, memory: int | float | str) -> None:
        """Hold more or less memory from now on, without loading anew.

        Args:
            memory: As for `load`.

        Raises:
            NotEnoughMemory: If the model cannot run in that. It goes on as before; of
                several machines, some may have taken it over.
            FlashError: If its conversations do not fit, or if it was closed.
        """
        self.check_open()
        assert self.pool is not None
        if self.machines is not None:
            memory = self.machines.resize(memory)
        self.pool.resize(self.pool.bytes_of(memory) - self.draft_bytes)

    def follow_pressure(self) -> None:
        """Hold less while others need memory, and at most what it holds now.

        A thread watches the machine until the model is closed; see `memory.elastic`.
        """
        pool = self.pool
        assert pool is not None
        elastic = Elastic(pool.budget.total_bytes, pool.least_bytes)
        self._watch = Watch(elastic, weakref.WeakMethod(pool.want))
        weakref.finalize(self, self._watch.stop).atexit = False

    @property
    def lossy(self) -> str | None:
        """In what its output is not the model's own, in words; None if it is."""
        skipping = self.manifest.skipping
        if not self.skip or skipping is None:
            return None
        return skipping.cost(self.skip)

    @property
    def resized(self) -> list[tuple[float, int]]:
        """(time.perf_counter() of it, the new budget's bytes) of every change."""
        return [] if self.pool is None else self.pool.resized

    @property
    def refused(self) -> list[tuple[float, int, int]]:
        """(time.perf_counter(), budget wanted, budget kept) where it could not shrink
        as far as it should have."""
        return [] if self.pool is None else self.pool.refused

    @property
    def draft_bytes(self) -> int:
        """What a draft takes of the memory, which `budget` does not have."""
        return self.draft.nbytes if self.draft else 0

    @property
    def direct_io(self) -> bool:
        """Whether reads go past the operating system's page cache."""
        return self._reader.direct

    def report(self) -> RunReport:
        """The figures of the last generation; `str` of it is a text for a person."""
        report = RunReport.of(self)
        if self.machines is not None and not self.closed:
            report.ranks = self.machines.ranks(self.stats)
        return report

    def close(self) -> None:
        """End the reader's threads, close its files, let go of the slots.

        A step that another thread is in ends first; its next one raises a FlashError.
        """
        if self._watch is not None:
            self._watch.stop()
        if self.machines is not None and not self.closed:
            self.machines.close()
        with self._fence.lock:
            self.closed = True
            for module in (*self.layers, *self.beside):
                module.detach()
            if self.pool is not None:
                self.pool.close()
            self._reader.close()
            self._in_use()
            self.limits.release()
            self._draft_limits.release()

    def check_open(self) -> None:
        """Raise a FlashError if the model was closed."""
        if self.closed:
            raise FlashError(CLOSED)


class Loaded(tuple):
    """What `load` returns: unpack it, or use it in `with` to close it at the end."""

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self[0].flash.close()
