"""What happens inside of a loaded model, as one picture: for the page and for `top`.

Reading it takes no lock that a step of the model takes. A picture may be torn (a unit
is counted as held and, a moment later, as not); it is never an error.
"""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import FlashError
from ..flash import Flash
from ..memory import pressure
from ..memory.policies import EMPTY
from ..memory.slots import UnitSlots
from ..memory.stats import Stats
from ..memory.system import process_bytes
from ..run import Run
from .meter import Meter

COLUMNS = 256  # of the heat map, at most: a screen has no more to spare
KEEP_S = 0.2  # several who watch share a picture


@dataclass(frozen=True)
class Model:
    """What is served. `chat` is whether it has a chat template."""

    name: str
    unit: str
    bytes: int
    layers: int
    context: int
    page_cache: bool
    chat: bool


@dataclass(frozen=True)
class Memory:
    """Bytes: the budget and its parts, what MLX holds of it, and the machine's.

    `short` is whether the kernel says that memory is short.
    """

    budget: int
    resident: int
    predictors: int
    slots: int
    kv_cache: int
    workspace: int
    draft: int
    held: int
    peak: int
    process: int
    available: int
    machine: int
    short: bool


@dataclass(frozen=True)
class Requests:
    """Of the server, since it started; `reading` is a prompt's (tokens read, all)."""

    waiting: int
    running: int
    ended: int
    prompt_tokens: int
    generated_tokens: int
    reading: tuple[int, int] | None


@dataclass(frozen=True)
class Answer:
    """The answer that is generated, or the last one. Times are in seconds.

    `begun_s` tells one answer from another. What is not known yet is None. `io_s`,
    `cache_s` and `compute_s` are those of decoding: after the first new token.
    """

    begun_s: float
    tokens: int
    first_token_s: float | None = None
    tokens_per_s: float | None = None
    hit_rate: float | None = None
    bytes_per_token: float | None = None
    waits_per_token: float | None = None
    read_gb_per_s: float | None = None
    io_s: float | None = None
    cache_s: float | None = None
    compute_s: float | None = None


@dataclass(frozen=True)
class LayerState:
    """One FFN. `asked` and `held` are its row of the heat map, unit after unit.

    A row has a column for each unit, or 256 of about as many units each. Both are
    base64: `asked` of 32-bit integers, little endian (how often the units of a column
    were asked for, added up), `held` of bytes (the share of a column's units that is in
    memory; 255 is all).
    """

    module: str
    units: int
    slots: int
    held_units: int
    whole: bool
    asked: str
    held: str


@dataclass(frozen=True)
class State:
    """All of it; `at_s` counts from the start of the server."""

    at_s: float
    model: Model
    memory: Memory
    requests: Requests
    answer: Answer | None
    counters: Stats
    layers: list[LayerState]


class Monitor:
    """Takes pictures of a model, whoever asks, a few a second at most.

    Args:
        flash: Of the model.
        meter: Counts the requests.
        name: What the model is called.
        chat: Whether it has a chat template.
    """

    def __init__(self, flash: Flash, meter: Meter, name: str, chat: bool):
        self.flash = flash
        self.meter = meter
        self.name = name
        self._chat = chat
        self._begun = time.perf_counter()
        self._machine_bytes = pressure.machine_bytes()
        self._last: tuple[float, str] | None = None

    def mark(self) -> tuple:
        """Something that changes when there is something new to see."""
        stats, run, meter = self.flash.stats, self.flash.run, self.meter
        tokens = len(run.tokens) if run else 0
        asked = stats.hits, stats.misses, stats.bytes_read, tokens
        reading = meter.progress and meter.progress.tokens
        return asked, meter.waiting, meter.running, reading, self.flash.resized[-1:]

    def json(self) -> str:
        """The state as JSON, not older than 0.2 seconds."""
        now = time.perf_counter()
        if self._last is None or now - self._last[0] > KEEP_S:
            self._last = now, json.dumps(self.state(), default=vars)
        return self._last[1]

    def state(self) -> State:
        flash = self.flash
        return State(
            at_s=time.perf_counter() - self._begun,
            model=self._model(),
            memory=self._memory(),
            requests=self._requests(),
            answer=_answer(flash.run, self._begun),
            counters=flash.stats.copy(),
            layers=_layers(flash),
        )

    def _model(self) -> Model:
        flash = self.flash
        return Model(
            name=self.name,
            unit=flash.kind.name,
            bytes=flash.manifest.model_bytes,
            layers=len(flash.layers),
            context=flash.budget.context,
            page_cache=not flash.direct_io,
            chat=self._chat,
        )

    def _memory(self) -> Memory:
        flash, budget = self.flash, self.flash.budget
        return Memory(
            budget=budget.total_bytes + flash.draft_bytes,
            resident=budget.resident_bytes,
            predictors=budget.predictor_bytes,
            slots=budget.slot_bytes,
            kv_cache=budget.kv_bytes,
            workspace=budget.workspace_bytes,
            draft=flash.draft_bytes,
            held=mx.get_active_memory() + mx.get_cache_memory(),
            peak=mx.get_peak_memory(),
            process=process_bytes(),
            available=pressure.available_bytes(),
            machine=self._machine_bytes,
            short=pressure.is_short(),
        )

    def _requests(self) -> Requests:
        meter, progress = self.meter, self.meter.progress
        return Requests(
            waiting=meter.waiting,
            running=meter.running,
            ended=meter.requests.total(),
            prompt_tokens=meter.prompt_tokens,
            generated_tokens=meter.generated_tokens,
            reading=(progress.tokens, progress.total) if progress else None,
        )


def _answer(run: Run | None, begun: float) -> Answer | None:
    """Figures of a run that another thread goes on with."""
    if run is None:
        return None
    count, first, last = len(run.tokens), run.first_stats, run.last_stats
    answer = Answer(run.begin_time - begun, count)
    if first is None or last is None:
        return answer
    spent, decode_s, decoded = last - first, run.last_time - run.first_time, count - 1
    facts: dict[str, Any] = {"first_token_s": run.first_time - run.begin_time}
    if decoded > 0 and decode_s > 0:
        facts["tokens_per_s"] = decoded / decode_s
        facts["hit_rate"] = spent.hit_rate
        facts["bytes_per_token"] = spent.bytes_read / decoded
        facts["waits_per_token"] = spent.waits / decoded
        facts["read_gb_per_s"] = spent.read_gb_per_s
        facts["io_s"], facts["cache_s"] = spent.io_s, spent.cache_s
        facts["compute_s"] = max(decode_s - spent.io_s - spent.cache_s, 0.0)
    return Answer(answer.begun_s, count, **facts)


def _layers(flash: Flash) -> list[LayerState]:
    facts = zip(flash.manifest.layers, flash.layers, strict=False)
    try:
        return [_layer(entry.module, layer.slots) for entry, layer in facts]
    except FlashError:  # it was closed
        return []


def _layer(module: str, slots: UnitSlots) -> LayerState:
    held = held_units(slots)
    shares = summed(held) / summed(np.ones_like(held))
    return LayerState(
        module=module,
        units=slots.units,
        slots=slots.n_slots,
        held_units=int(np.count_nonzero(held)),
        whole=slots.holds_all,
        asked=_text(summed(slots.asked.counts()).astype("<u4")),
        held=_text((shares * 255).astype(np.uint8)),
    )


def held_units(slots: UnitSlots) -> np.ndarray:
    """bool [units]: which units are in memory at the moment."""
    cache = slots.cache  # another one after a resize
    units = cache.unit_of[cache.valid]
    held = np.zeros(slots.units, bool)
    held[units[units != EMPTY]] = True
    return held


def summed(values: np.ndarray) -> np.ndarray:
    """The sums of groups of neighbouring values, as many groups as COLUMNS at most."""
    if len(values) <= COLUMNS:
        return values.astype(np.int64)
    edges = np.arange(COLUMNS) * len(values) // COLUMNS
    return np.add.reduceat(values, edges, dtype=np.int64)


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()
