"""What a run asked of the flash and what it cost: one set of counters for all of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..storage.reader import ReadResult


@dataclass
class Stats:
    """Counters of all layers since the model was loaded or `reset`.

    `io_s` is the time the model waited for reads, `read_s` the time in which reads were
    under way, `cache_s` the bookkeeping of slots. `early` units were read on a guess,
    of which `early_right` were needed. `swept_*` count neurons of prompt sweeps, where
    predictions can be compared with the truth because every neuron is computed anyway.
    `waits` counts how often the host waited for MLX to know what to read, while MLX had
    nothing else to do; `waits_for_slots` how often for slots that MLX still computed
    from, behind which reads were under way. `rows` of embeddings that were looked up
    are no hits and misses; `rows_read` of them were not in memory.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    reads: int = 0
    early: int = 0
    early_right: int = 0
    read_s: float = 0.0
    io_s: float = 0.0
    cache_s: float = 0.0
    waits: int = 0
    waits_for_slots: int = 0
    swept_active: int = 0
    swept_predicted: int = 0
    rows: int = 0
    rows_read: int = 0

    @classmethod
    def of(cls, found: dict) -> Stats:
        """Those of the figures by name that are counters."""
        return cls(**{f.name: found[f.name] for f in dataclasses.fields(cls)})

    @property
    def asked(self) -> int:
        """How often a unit was needed."""
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float | None:
        return self.hits / self.asked if self.asked else None

    @property
    def early_precision(self) -> float | None:
        """Share of the units read on a guess that were needed."""
        return self.early_right / self.early if self.early else None

    @property
    def early_share(self) -> float | None:
        """Share of the units that had to be read that were begun to be read early."""
        return self.early_right / self.misses if self.early else None

    @property
    def read_gb_per_s(self) -> float | None:
        return self.bytes_read / 1e9 / self.read_s if self.read_s else None

    @property
    def read_hidden_share(self) -> float | None:
        """Share of the time of reads during which something else was done."""
        return max(1 - self.io_s / self.read_s, 0.0) if self.read_s else None

    @property
    def predictor_recall(self) -> float | None:
        """Share of the active neurons of swept prompts that were predicted."""
        if not self.swept_active:
            return None
        return self.swept_predicted / self.swept_active

    def count_units(self, needed: int, missing: int) -> None:
        """Add units of FFNs that were needed, of which some were not in memory."""
        self.hits += needed - missing
        self.misses += missing

    def count_rows(self, needed: int, missing: int) -> None:
        """The same of rows of embeddings."""
        self.rows += needed
        self.rows_read += missing

    def count(self, result: ReadResult) -> None:
        """Add what a batch of reads took."""
        self.read_s += result.seconds
        self.bytes_read += result.bytes_read
        self.reads += result.reads

    def copy(self) -> Stats:
        return dataclasses.replace(self)

    def reset(self) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, field.default)

    def __sub__(self, earlier: Stats) -> Stats:
        """What was counted since `earlier`, a copy taken before."""
        return Stats(
            **{
                f.name: getattr(self, f.name) - getattr(earlier, f.name)
                for f in dataclasses.fields(self)
            }
        )

    def __add__(self, other: Stats) -> Stats:
        return Stats(
            **{
                f.name: getattr(self, f.name) + getattr(other, f.name)
                for f in dataclasses.fields(self)
            }
        )
