"""Take pictures of a model while it works.

Reading takes no lock that a step of the model takes. A picture may be torn (a unit is
counted as held and, a moment later, as not); it is never an error.
"""

from __future__ import annotations

import base64
import functools
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
from ..memory.system import process_bytes
from ..run import Run
from .meter import Meter
from .state import Answer, LayerState, Memory, Model, Requests, State

COLUMNS = 256  # of the heat map, at most: a screen has no more to spare
KEEP_S = 0.2  # several who watch share a picture
LOOK_S = 1.0  # between two looks at the machine, which cost as much as all the rest


@dataclass(frozen=True)
class _Machine:
    """What the machine said when somebody looked."""

    at: float
    process: int
    available: int
    short: bool


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
        self._looked = self._look()

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
            lossy=flash.lossy,
        )

    def _memory(self) -> Memory:
        flash, budget = self.flash, self.flash.budget
        if time.perf_counter() - self._looked.at > LOOK_S:
            self._looked = self._look()
        held = mx.get_active_memory() + mx.get_cache_memory()
        seen = flash.run.held_bytes if flash.run else 0
        return Memory(
            budget=budget.total_bytes + flash.draft_bytes,
            resident=budget.resident_bytes,
            predictors=budget.predictor_bytes,
            slots=budget.slot_bytes,
            kv_cache=budget.kv_bytes,
            workspace=budget.workspace_bytes,
            draft=flash.draft_bytes,
            held=held,
            peak=max(mx.get_peak_memory(), seen, held),
            process=self._looked.process,
            available=self._looked.available,
            machine=self._machine_bytes,
            short=self._looked.short,
        )

    def _look(self) -> _Machine:
        process, available = process_bytes(), pressure.available_bytes()
        short = pressure.is_short()
        return _Machine(time.perf_counter(), process, available, short)

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
    shares = summed(held) / sizes(slots.units)
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
    return np.add.reduceat(values, _edges(len(values)), dtype=np.int64)


@functools.cache
def sizes(units: int) -> np.ndarray:
    """How many units each of these groups has."""
    return summed(np.ones(units, np.int64))


@functools.cache
def _edges(units: int) -> np.ndarray:
    return np.arange(COLUMNS) * units // COLUMNS


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()
