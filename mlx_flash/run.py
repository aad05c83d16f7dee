"""What one generation did, counted while it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx

from .memory.stats import Stats
from .storage.manifest import Manifest

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse


@dataclass
class DraftStats:
    """Counters of calls after the prompt's.

    `plain_*` are the calls without a draft: what a token reads when nothing is drafted.
    """

    calls: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    plain_calls: int = 0
    plain_bytes: int = 0
    bytes_read: int = 0

    def count(self, drafted: int, accepted: int, tokens: int, nbytes: int) -> None:
        """Add a call that brought so many tokens and had so many bytes read."""
        self.calls += 1
        self.tokens += tokens
        self.drafted += drafted
        self.accepted += accepted
        self.bytes_read += nbytes
        if not drafted:
            self.plain_calls += 1
            self.plain_bytes += nbytes

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were right."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_call(self) -> float | None:
        return self.tokens / self.calls if self.calls else None

    def plain_bytes_per_token(self, every_unit: bool) -> float | None:
        """What a token would have had read without drafts, as far as it is known.

        Args:
            every_unit: Whether each call reads the same, however many tokens it has.
        """
        if every_unit:
            return self.bytes_read / self.calls if self.calls else None
        return self.plain_bytes / self.plain_calls if self.plain_calls else None


@dataclass(frozen=True)
class RankReport:
    """What one of several machines has read since the model was loaded.

    Attributes:
        name: Of the rank.
        bytes_read: From its disk.
        hit_rate: Share of the units asked for of it that were in its memory.
        sums: How often results were added up over all ranks.
    """

    name: str
    bytes_read: int
    hit_rate: float | None
    sums: int

    def __str__(self) -> str:
        held = "" if self.hit_rate is None else f", {self.hit_rate:.0%} was in memory"
        return f"{self.name} read {self.bytes_read / 1e6:,.1f} MB{held}"


@dataclass(frozen=True)
class BesideReport:
    """What is on flash beside a model's layers, and how much of it memory holds.

    Attributes:
        blocks, blocks_held_whole, block_bytes: Dense FFNs of a mixture of experts.
        tables, tables_held_whole, table_bytes: Tables of embeddings.
    """

    blocks: int = 0
    blocks_held_whole: int = 0
    block_bytes: int = 0
    tables: int = 0
    tables_held_whole: int = 0
    table_bytes: int = 0

    @classmethod
    def of(cls, manifest: Manifest, slots: Sequence[int]) -> BesideReport:
        """The report of a model that has so many slots of each."""
        whole = [n == x.units for n, x in zip(slots, manifest.beside, strict=True)]
        count = len(manifest.blocks)
        return cls(
            count,
            sum(whole[:count]),
            manifest.beside_bytes - manifest.table_bytes,
            len(manifest.tables),
            sum(whole[count:]),
            manifest.table_bytes,
        )

    def lines(self) -> list[str]:
        """A line for a person of each sort that there is."""
        lines = []
        if self.blocks:
            lines.append(
                f"dense       {self.block_bytes / 1e6:,.1f} MB on flash as blocks; "
                f"FFNs held whole: {self.blocks_held_whole} of {self.blocks}"
            )
        if self.tables:
            lines.append(
                f"embeddings  {self.table_bytes / 1e6:,.1f} MB on flash, read by rows; "
                f"tables held whole: {self.tables_held_whole} of {self.tables}"
            )
        return lines


@dataclass
class Run:
    """What one generation did, kept up to date while it runs.

    Decoding is measured from the first new token on, so that reading the prompt does
    not count as a token.
    """

    before: Stats
    begin_time: float = field(default_factory=time.perf_counter)
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    last: GenerationResponse | None = None
    prompt_stats: Stats | None = None
    first_stats: Stats | None = None
    last_stats: Stats | None = None
    prompt_time: float = 0.0
    first_time: float = 0.0
    last_time: float = 0.0
    held_bytes: int = 0
    drafts: DraftStats | None = None

    def note_prompt(self, stats: Stats) -> None:
        """Take in the counters when the prompt has been read and nothing else."""
        self.prompt_time, self.prompt_stats = time.perf_counter(), stats.copy()

    def note(self, response: GenerationResponse, stats: Stats) -> None:
        """Take in one more response, and the counters as they are now."""
        self.last_time, self.last_stats = time.perf_counter(), stats.copy()
        if self.first_stats is None:
            self.first_time, self.first_stats = self.last_time, self.last_stats
        if response.generation_tokens > len(self.tokens):
            self.tokens.append(response.token)
        self.text += response.text
        self.last = response
        held = mx.get_active_memory() + mx.get_cache_memory()
        self.held_bytes = max(self.held_bytes, held)
