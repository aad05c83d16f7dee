"""`/metrics`: the model's own counters under Prometheus' conventions.

Nothing is counted twice: a scrape reads what the model and the meter have anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from .._version import __version__
from .monitor import Monitor
from .state import State

PREFIX = "mlx_flash_"


class FlashCollector(Collector):
    """Makes metrics of a monitor's state whenever somebody scrapes."""

    def __init__(self, monitor: Monitor):
        self._monitor = monitor
        self._most: dict[str, float] = {}

    def describe(self) -> Iterable[Metric]:
        """Nothing: to describe would be to collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        state = self._monitor.state()
        yield InfoMetricFamily(
            f"{PREFIX}model",
            "What is served.",
            {
                "name": state.model.name,
                "unit": state.model.unit,
                "version": __version__,
                "lossy": state.model.lossy or "",
            },
        )
        yield self._requests()
        yield from self._counters(state)
        yield from _memory(state)
        yield from _layers(state)

    def _requests(self) -> Metric:
        family = CounterMetricFamily(
            f"{PREFIX}requests",
            "Requests that ended, by API and by what became of them.",
            labels=("api", "outcome"),
        )
        for labels, count in sorted(self._monitor.meter.requests.items()):
            family.add_metric(labels, count)
        return family

    def _counters(self, state: State) -> Iterator[Metric]:
        stats, meter = state.counters, self._monitor.meter
        for name, said, value in (
            ("prompt_tokens", "Tokens of prompts.", meter.prompt_tokens),
            (
                "prompt_tokens_cached",
                "Those of them that a kept KV cache had.",
                meter.cached_tokens,
            ),
            ("generated_tokens", "Tokens of answers.", meter.generated_tokens),
            ("unit_hits", "Units that were in memory when needed.", stats.hits),
            ("unit_misses", "Units that had to be read.", stats.misses),
            ("read_bytes", "Read from flash.", stats.bytes_read),
            ("reads", "Reads from flash.", stats.reads),
            ("read_seconds", "Time in which reads were under way.", stats.read_s),
            ("read_wait_seconds", "Time that MLX waited for reads.", stats.io_s),
            ("bookkeeping_seconds", "Time of the slots' bookkeeping.", stats.cache_s),
            ("choice_waits", "Waits for MLX, to know what to read.", stats.waits),
            (
                "slot_waits",
                "Waits for MLX, to have slots free.",
                stats.waits_for_slots,
            ),
            ("early_units", "Units that were read on a guess.", stats.early),
            ("early_units_right", "Those of them that were needed.", stats.early_right),
        ):
            yield CounterMetricFamily(PREFIX + name, said, self._rising(name, value))

    def _rising(self, name: str, value: float) -> float:
        """Never less than at the last scrape, as Prometheus wants counters.

        Hits become misses when units that were read on a guess turn out to be needed.
        """
        self._most[name] = max(value, self._most.get(name, 0.0))
        return self._most[name]


def _memory(state: State) -> Iterator[Metric]:
    memory, requests = state.memory, state.requests
    for name, said, value in (
        ("requests_waiting", "Requests whose turn has not come.", requests.waiting),
        ("requests_running", "Requests that are answered.", requests.running),
        ("memory_budget_bytes", "All that the model may hold.", memory.budget),
        ("memory_held_bytes", "What MLX holds, freed buffers included.", memory.held),
        ("memory_peak_bytes", "The most that MLX held.", memory.peak),
        ("kv_cache_bytes", "Reserved for conversations.", memory.kv_cache),
        ("slot_bytes", "Of the budget, for units from flash.", memory.slots),
        ("resident_bytes", "Of the budget, for what stays.", memory.resident),
        ("process_bytes", "What the process takes.", memory.process),
        ("machine_available_bytes", "What the machine has free.", memory.available),
        ("machine_memory_short", "1 if the kernel says so.", int(memory.short)),
    ):
        yield GaugeMetricFamily(PREFIX + name, said, value)


def _layers(state: State) -> Iterator[Metric]:
    held = GaugeMetricFamily(
        f"{PREFIX}layer_held_ratio",
        "The share of a layer's units that is in memory.",
        labels=("layer",),
    )
    for i, layer in enumerate(state.layers):
        held.add_metric((str(i),), layer.held_units / layer.units)
    yield held


def scrape(monitor: Monitor, collector: FlashCollector) -> bytes:
    """All metrics as Prometheus reads them."""
    return generate_latest(_Both(collector, monitor.meter.registry))


class _Both(Collector):
    def __init__(self, *parts: Collector):
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        for part in self._parts:
            yield from part.collect()
