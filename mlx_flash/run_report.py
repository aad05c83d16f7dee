"""What a generation did and what it cost: figures for scripts, lines for a person."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx

from .memory.budget import Budget
from .memory.stats import Stats
from .memory.system import peak_process_bytes
from .storage.manifest import Manifest

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse


COLD = 0.01  # of the files in memory, at most


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
    first_stats: Stats | None = None
    last_stats: Stats | None = None
    first_time: float = 0.0
    last_time: float = 0.0
    held_bytes: int = 0

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


class Reported(Protocol):
    """What a report is made from: `flash.Flash` is one."""

    manifest: Manifest
    layers: list
    run: Run | None
    cached_share: float | None

    @property
    def budget(self) -> Budget: ...

    @property
    def direct_io(self) -> bool: ...

    @property
    def resized(self) -> list[tuple[float, int]]: ...


@dataclass
class RunReport:
    """The figures of a model's last run, under the names that `--json` prints.

    Bytes are bytes, GB is 1e9, times are milliseconds for each new token: `io` is
    waiting for reads, `cache` the bookkeeping of slots, `compute` all the rest. The
    prompt and the first new token are apart from them. What could not be measured (a
    run of one token has no time per token) is None. Freed buffers that MLX keeps count
    as memory, as far as they were seen after a token. `resizes` has the seconds since
    the run began, and the new budget, of each time that memory gave way or came back.

    `page_cache` is whether reads went through the page cache, `cached_share` what of
    the files they could find in memory when the model was loaded: 0 is cold.
    """

    unit: str
    model_bytes: int
    resident_bytes: int
    predictor_bytes: int
    slot_bytes: int
    memory_budget_bytes: int
    peak_memory_bytes: int
    peak_process_bytes: int
    layers_from_flash: int
    layers_total: int
    layers_held_whole: int
    page_cache: bool
    cached_share: float | None
    resizes: list[tuple[float, int]] = field(default_factory=list)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prompt_tokens_per_s: float | None = None
    time_to_first_token_s: float | None = None
    tokens_per_s: float | None = None
    ms_per_token: dict[str, float | None] = field(
        default_factory=lambda: dict.fromkeys(("io", "cache", "compute", "total"))
    )
    bytes_per_token: float | None = None
    reads_per_token: float | None = None
    read_gb_per_s: float | None = None
    read_hidden_share: float | None = None
    early_precision: float | None = None
    hit_rate: float | None = None
    waits_per_token: float | None = None
    predictor_recall: float | None = None

    @classmethod
    def of(cls, flash: Reported) -> RunReport:
        """The report of a loaded model as it stands."""
        run, budget, manifest = flash.run, flash.budget, flash.manifest
        last = run.last if run else None
        report = cls(
            unit=manifest.unit,
            model_bytes=manifest.model_bytes,
            resident_bytes=budget.resident_bytes,
            predictor_bytes=budget.predictor_bytes,
            slot_bytes=budget.slot_bytes,
            memory_budget_bytes=budget.total_bytes,
            peak_memory_bytes=max(mx.get_peak_memory(), run.held_bytes if run else 0),
            peak_process_bytes=peak_process_bytes(),
            layers_from_flash=len(flash.layers),
            layers_total=len(manifest.layers),
            layers_held_whole=sum(
                n == layer.units
                for n, layer in zip(budget.slots, manifest.layers, strict=True)
            ),
            page_cache=not flash.direct_io,
            cached_share=flash.cached_share,
        )
        if run is None or last is None or run.last_stats is None:
            return report
        report.resizes = [
            (when - run.begin_time, nbytes)
            for when, nbytes in flash.resized
            if when >= run.begin_time
        ]
        report.prompt_tokens = last.prompt_tokens
        report.generation_tokens = len(run.tokens)
        report.prompt_tokens_per_s = last.prompt_tps
        report.time_to_first_token_s = run.first_time - run.begin_time
        if any("predictor" in layer for layer in flash.layers):
            recall = (run.last_stats - run.before).predictor_recall
            report.predictor_recall = recall or _recorded_recall(manifest)
        if len(run.tokens) > 1:
            report._add_decoding(run)
        return report

    def _add_decoding(self, run: Run) -> None:
        assert run.first_stats is not None and run.last_stats is not None
        steps = len(run.tokens) - 1
        decode = run.last_stats - run.first_stats
        total_s = (run.last_time - run.first_time) / steps
        io_s, cache_s = decode.io_s / steps, decode.cache_s / steps
        self.tokens_per_s = 1 / total_s
        self.ms_per_token = {
            "io": 1e3 * io_s,
            "cache": 1e3 * cache_s,
            "compute": 1e3 * (total_s - io_s - cache_s),
            "total": 1e3 * total_s,
        }
        self.bytes_per_token = decode.bytes_read / steps
        self.reads_per_token = decode.reads / steps
        self.read_gb_per_s = decode.read_gb_per_s
        self.read_hidden_share = decode.read_hidden_share
        self.early_precision = decode.early_precision
        self.hit_rate = decode.hit_rate
        self.waits_per_token = decode.waits / steps

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, as `generate --json` prints them."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if self.time_to_first_token_s is None:
            return "nothing was generated"
        lines = [
            f"prompt      {self.prompt_tokens} tokens, "
            f"{self.prompt_tokens_per_s:.1f} tokens/s, first token after "
            f"{self.time_to_first_token_s:.2f} s"
        ]
        if self.tokens_per_s:
            lines += self._decoding_lines()
        if self.early_precision is not None:
            lines.append(
                f"look-ahead  {self.early_precision:.0%} of the guesses were right"
            )
        lines += [
            f"memory      {self.peak_memory_bytes / 1e6:.1f} MB at most, budget "
            f"{self.memory_budget_bytes / 1e6:.1f} MB, model "
            f"{self.model_bytes / 1e6:.1f} MB (the process with Python and libraries "
            f"{self.peak_process_bytes / 1e6:.0f} MB)",
            f"layers      {self.layers_from_flash} of {self.layers_total} FFN layers "
            f"from flash, {self.layers_held_whole} of them held whole",
            self._reads_line(),
        ]
        if self.resizes:
            least = min(nbytes for _, nbytes in self.resizes)
            lines.append(
                f"elastic     the budget changed {len(self.resizes)} times, down to "
                f"{least / 1e6:.1f} MB"
            )
        if self.predictor_recall:
            lines.append(
                f"predictor   found {self.predictor_recall:.1%} of the active neurons"
            )
        return "\n".join(lines)

    def _reads_line(self) -> str:
        line = (
            f"reads       {'through' if self.page_cache else 'around'} the page cache"
        )
        if self.cached_share is None:
            return line + ", cold or warm is not known"
        if self.cached_share < COLD:
            return line + ", cold"
        return line + f", {self.cached_share:.0%} of the files were in memory before"

    def _decoding_lines(self) -> list[str]:
        ms, speed = self.ms_per_token, self.read_gb_per_s
        hidden = self.read_hidden_share
        flash = (
            f"flash       {(self.bytes_per_token or 0) / 1e6:.3f} MB in "
            f"{self.reads_per_token:.0f} reads per token"
        )
        if speed:
            flash += f", {speed:.2f} GB/s"
        if hidden:
            flash += f", {hidden:.0%} of that time hidden behind compute"
        if self.hit_rate is not None:
            flash += f", {self.hit_rate:.0%} of {self.unit}s were in memory"
        return [
            f"generation  {self.generation_tokens} tokens, "
            f"{self.tokens_per_s:.1f} tokens/s, {ms['total']:.2f} ms per token = "
            f"{ms['io']:.2f} I/O + {ms['cache']:.2f} cache + {ms['compute']:.2f} "
            "compute",
            flash,
            f"waits       {self.waits_per_token:.1f} per token of the host for MLX, to "
            "know what to read",
        ]


def _recorded_recall(manifest: Manifest) -> float | None:
    """Mean recall on held-out text at conversion, where a run had no prompt sweep."""
    facts = [layer.predictor for layer in manifest.layers if layer.predictor]
    return sum(f.recall for f in facts) / len(facts) if facts else None
