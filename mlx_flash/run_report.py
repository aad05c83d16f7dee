"""What a generation did and what it cost: figures for scripts, lines for a person."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from .layers.kinds import BLOCK, kind_of
from .memory.stats import Stats
from .memory.system import peak_process_bytes
from .reported import Reported
from .run import BesideReport, RankReport, Run
from .storage.manifest import Manifest

COLD = 0.01  # of the files in memory, at most


def _no_parts() -> dict[str, float | None]:
    return dict.fromkeys(("io", "cache", "compute", "total"))


def _parts(spent: Stats, total_s: float, scale: float) -> dict[str, float | None]:
    """Where the time went, times `scale`."""
    io_s, cache_s = spent.io_s * scale, spent.cache_s * scale
    total = total_s * scale
    compute = total - io_s - cache_s
    return {"io": io_s, "cache": cache_s, "compute": compute, "total": total}


@dataclass
class RunReport:
    """The figures of a model's last run, under the names that `--json` prints.

    Bytes are bytes, GB is 1e9, times are milliseconds for each new token: `io` is
    waiting for reads, `cache` the bookkeeping of slots, `compute` all the rest. The
    prompt and the first new token are apart from them. What could not be measured (a
    run of one token has no time per token) is None. Freed buffers that MLX keeps count
    as memory, as far as they were seen after a token. `resizes` has the seconds since
    the run began, and the new budget, of each time that memory gave way or came back;
    `resizes_refused` has the seconds, the budget that others needed and the one that
    the conversations left possible.

    `prompt_s` has the same parts of reading the prompt, in seconds. The first token is
    given out later: mlx-lm begins with the second one before.

    With drafts, `draft_acceptance` is the share of drafted tokens that were right,
    `tokens_per_call` what a call of the model brought, and `plain_bytes_per_token` what
    calls without a draft read (of blocks: any call).

    `skip` is the share of the neurons that each token left out, `lossy` says what that
    was measured to cost; 0 and None where the output is the model's own.

    `ranks` has what each of several machines read; it is empty on one.
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
    draft_bytes: int
    layers_from_flash: int
    layers_total: int
    layers_held_whole: int
    page_cache: bool
    cached_share: float | None
    beside: BesideReport = field(default_factory=BesideReport)
    resizes: list[tuple[float, int]] = field(default_factory=list)
    resizes_refused: list[tuple[float, int, int]] = field(default_factory=list)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prompt_tokens_per_s: float | None = None
    prompt_bytes_read: int | None = None
    prompt_s: dict[str, float | None] = field(default_factory=_no_parts)
    time_to_first_token_s: float | None = None
    tokens_per_s: float | None = None
    ms_per_token: dict[str, float | None] = field(default_factory=_no_parts)
    bytes_per_token: float | None = None
    reads_per_token: float | None = None
    read_gb_per_s: float | None = None
    read_hidden_share: float | None = None
    early_precision: float | None = None
    early_share: float | None = None
    hit_rate: float | None = None
    waits_per_token: float | None = None
    predictor_recall: float | None = None
    draft_acceptance: float | None = None
    tokens_per_call: float | None = None
    plain_bytes_per_token: float | None = None
    skip: float = 0.0
    lossy: str | None = None
    ranks: list[RankReport] = field(default_factory=list)

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
            memory_budget_bytes=budget.total_bytes + flash.draft_bytes,
            peak_memory_bytes=max(mx.get_peak_memory(), run.held_bytes if run else 0),
            peak_process_bytes=peak_process_bytes(),
            draft_bytes=flash.draft_bytes,
            layers_from_flash=len(flash.layers),
            layers_total=len(manifest.layers),
            layers_held_whole=sum(
                n == layer.units
                for n, layer in zip(budget.slots, manifest.layers, strict=True)
            ),
            page_cache=not flash.direct_io,
            cached_share=flash.cached_share,
            beside=BesideReport.of(manifest, budget.beside_slots),
            skip=flash.skip,
            lossy=flash.lossy,
        )
        if run is None or last is None or run.last_stats is None:
            return report
        report.resizes = [
            (when - run.begin_time, nbytes)
            for when, nbytes in flash.resized
            if when >= run.begin_time
        ]
        report.resizes_refused = [
            (when - run.begin_time, wanted, kept)
            for when, wanted, kept in flash.refused
            if when >= run.begin_time
        ]
        report.prompt_tokens = last.prompt_tokens
        report.generation_tokens = len(run.tokens)
        report._add_prompt(run)
        report.time_to_first_token_s = run.first_time - run.begin_time
        if any("predictor" in layer for layer in flash.layers):
            recall = (run.last_stats - run.before).predictor_recall
            report.predictor_recall = recall or _recorded_recall(manifest)
        if len(run.tokens) > 1:
            report._add_decoding(run)
        if run.drafts is not None:
            report.draft_acceptance = run.drafts.acceptance
            report.tokens_per_call = run.drafts.tokens_per_call
            every_unit = kind_of(manifest) is BLOCK
            plain = run.drafts.plain_bytes_per_token(every_unit)
            report.plain_bytes_per_token = plain
        return report

    def _add_prompt(self, run: Run) -> None:
        assert run.prompt_stats is not None
        spent, total_s = run.prompt_stats - run.before, run.prompt_time - run.begin_time
        self.prompt_tokens_per_s = self.prompt_tokens / total_s
        self.prompt_bytes_read = spent.bytes_read
        self.prompt_s = _parts(spent, total_s, 1.0)

    def _add_decoding(self, run: Run) -> None:
        assert run.first_stats is not None and run.last_stats is not None
        steps = len(run.tokens) - 1
        decode = run.last_stats - run.first_stats
        total_s = run.last_time - run.first_time
        self.tokens_per_s = steps / total_s
        self.ms_per_token = _parts(decode, total_s, 1e3 / steps)
        self.bytes_per_token = decode.bytes_read / steps
        self.reads_per_token = decode.reads / steps
        self.read_gb_per_s = decode.read_gb_per_s
        self.read_hidden_share = decode.read_hidden_share
        self.early_precision = decode.early_precision
        self.early_share = decode.early_share
        self.hit_rate = decode.hit_rate
        self.waits_per_token = decode.waits / steps

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, as `generate --json` prints them."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if self.time_to_first_token_s is None:
            return "nothing was generated"
        s = self.prompt_s
        lines = [
            f"prompt      {self.prompt_tokens} tokens, "
            f"{self.prompt_tokens_per_s:.1f} tokens/s, {s['total']:.2f} s = "
            f"{s['io']:.2f} I/O + {s['cache']:.2f} cache + {s['compute']:.2f} compute, "
            f"{(self.prompt_bytes_read or 0) / 1e6:.1f} MB; first token after "
            f"{self.time_to_first_token_s:.2f} s"
        ]
        if self.tokens_per_s:
            lines += self._decoding_lines()
        if self.draft_acceptance is not None:
            lines += self._draft_lines()
        if self.early_precision is not None and self.early_share is not None:
            lines.append(
                f"look-ahead  {self.early_share:.0%} of what had to be read was begun "
                f"early, {self.early_precision:.0%} of the guesses were right"
            )
        lines += [
            f"memory      {self.peak_memory_bytes / 1e6:.1f} MB at most, budget "
            f"{self.memory_budget_bytes / 1e6:.1f} MB, model "
            f"{self.model_bytes / 1e6:.1f} MB (the process with Python and libraries "
            f"{self.peak_process_bytes / 1e6:.0f} MB)",
            f"layers      {self.layers_from_flash} of {self.layers_total} FFN layers "
            f"from flash, {self.layers_held_whole} of them held whole",
        ]
        lines += self.beside.lines()
        lines.append(self._reads_line())
        if self.resizes:
            least = min(nbytes for _, nbytes in self.resizes)
            lines.append(
                f"elastic     the budget changed {len(self.resizes)} times, down to "
                f"{least / 1e6:.1f} MB"
            )
        if self.resizes_refused:
            _, wanted, kept = min(self.resizes_refused, key=lambda refusal: refusal[1])
            lines.append(
                f"            It should have been {wanted / 1e6:.1f} MB; the "
                f"conversations left no less than {kept / 1e6:.1f} MB"
            )
        if self.predictor_recall:
            lines.append(
                f"predictor   found {self.predictor_recall:.1%} of the active neurons"
            )
        if self.lossy:
            lines.append(f"output      {self.lossy}")
        lines += [f"machines    {rank}" for rank in self.ranks]
        return "\n".join(lines)

    def _reads_line(self) -> str:
        way = "through" if self.page_cache else "around"
        line = f"reads       {way} the page cache"
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

    def _draft_lines(self) -> list[str]:
        line = (
            f"drafts      {self.draft_acceptance:.0%} of the drafted tokens were "
            f"right, {self.tokens_per_call:.2f} tokens per call of the model"
        )
        plain, read = self.plain_bytes_per_token, self.bytes_per_token
        if plain is None or read is None:
            return [line]
        line += (
            f", {read / 1e6:.3f} MB per token; {plain / 1e6:.3f} MB in calls without a "
            "draft"
        )
        if read < plain:
            return [line]
        return [line, "            Drafting does not pay here: it does not save reads"]


def _recorded_recall(manifest: Manifest) -> float | None:
    """Mean recall on held-out text at conversion, where a run had no prompt sweep."""
    facts = [layer.predictor for layer in manifest.layers if layer.predictor]
    return sum(f.recall for f in facts) / len(facts) if facts else None
