"""`/metrics` and what the meter counts."""

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import complete, served

import mlx_flash
from mlx_flash.errors import FlashError
from mlx_flash.memory.stats import Stats
from mlx_flash.server import Settings, open_server
from mlx_flash.server.events import Done, Progress, Text, Usage
from mlx_flash.server.fields import Limits, Refused
from mlx_flash.server.meter import Meter
from mlx_flash.server.metrics import FlashCollector, scrape
from mlx_flash.server.monitor import Monitor
from mlx_flash.server.request import Request

DONE = Done("stop", Usage(7, 2, 3))


class Scripted:
    """A service whose answers are known; an exception among the events is raised."""

    limits = Limits("model", frozenset(), 10, 10)
    facts = None
    is_healthy = True

    def __init__(self, *events):
        self._events = events

    async def answer(self, request):
        for event in self._events:
            if isinstance(event, Exception):
                raise event
            yield event

    async def count_tokens(self, request):
        return 7


def test_everything_else_of_a_service_is_its_own():
    metered = Meter().of(Scripted(), "test")
    assert metered.is_healthy and metered.limits is Scripted.limits
    assert asyncio.run(metered.count_tokens(Request(prompt="x"))) == 7


def ask(meter, *events, most=None):
    """The events that a client gets, who leaves after `most` of them."""

    async def client():
        got = []
        answer = meter.of(Scripted(*events), "test").answer(Request(prompt="x"))
        async for event in answer:
            got.append(event)
            if len(got) == most:
                break
        await answer.aclose()
        return got

    return asyncio.run(client())


def samples(text):
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_meter_passes_everything_on():
    events = [Progress(0, 7), Text("a"), DONE]
    assert ask(Meter(), *events) == events


@pytest.mark.parametrize(
    "events, most, outcome",
    [
        ([Progress(0, 7), Text("a"), DONE], None, "stop"),
        ([Done("length", Usage(1, 0, 1))], None, "length"),
        ([Refused("too long")], None, "refused"),
        ([Text("a"), FlashError("a read failed")], None, "failed"),
        ([Text("a"), OSError("odd")], None, "failed"),
        ([Text("a"), Text("b"), DONE], 1, "left"),
    ],
)
def test_what_became_of_a_request(events, most, outcome):
    meter = Meter()
    try:
        ask(meter, *events, most=most)
    except (FlashError, OSError):
        pass
    assert dict(meter.requests) == {("test", outcome): 1}
    assert (meter.live, meter.progress) == (0, None)


def test_tokens_and_the_first_one():
    meter = Meter()
    ask(meter, Progress(0, 7), Text("a"), DONE)
    ask(meter, Progress(0, 7), DONE, most=1)
    assert meter.prompt_tokens == 7
    assert meter.cached_tokens == 2
    assert meter.generated_tokens == 3
    counts = {
        sample.name: sample.value
        for family in meter.registry.collect()
        for sample in family.samples
    }
    assert counts["mlx_flash_time_to_first_token_seconds_count"] == 1
    assert counts["mlx_flash_request_duration_seconds_count"] == 2


def test_only_one_runs_and_the_others_wait():
    meter = Meter()
    answers = [meter.of(Scripted(*x), "t").answer(Request()) for x in BUSY]

    async def all_begin():
        for answer in answers:
            await anext(answer)
        seen = meter.running, meter.waiting, meter.progress
        for answer in answers:
            await answer.aclose()
        return seen

    assert asyncio.run(all_begin()) == (1, 2, Progress(3, 9))
    assert (meter.running, meter.waiting) == (0, 0)


BUSY = [[Progress(3, 9)], [Progress(0, 5)], [Progress(0, 6)]]


def test_a_scrape_has_the_figures_of_the_report():
    settings = Settings(port=0)
    with open_server(str(mlx_flash.DEMO_MODEL), "50%", settings) as made, served(made):
        complete(made.port, "Once upon a time", max_tokens=6)
        found = samples(get(made.port, "/metrics"))
        flash = made.worker.model.flash
        report, stats = flash.report(), flash.stats
    name = "mlx_flash_"
    assert found[name + "requests_total", "openai", "length"] == 1
    assert found[name + "prompt_tokens_total",] == report.prompt_tokens
    assert found[name + "generated_tokens_total",] == report.generation_tokens == 6
    assert found[name + "unit_hits_total",] == stats.hits
    assert found[name + "unit_misses_total",] == stats.misses
    assert found[name + "read_bytes_total",] == stats.bytes_read
    assert found[name + "choice_waits_total",] == stats.waits
    assert found[name + "memory_budget_bytes",] == report.memory_budget_bytes
    assert found[name + "slot_bytes",] == report.slot_bytes
    assert found[name + "requests_running",] == 0
    assert found[name + "time_to_first_token_seconds_count",] == 1
    held = [value for key, value in found.items() if "layer_held_ratio" in key[0]]
    assert len(held) == 4 and all(0 < share < 1 for share in held)


def test_counters_never_fall():
    """Hits become misses when a guess turns out to be right."""
    with mlx_flash.load(mlx_flash.DEMO_MODEL, memory="50%") as (model, _):
        watched = Monitor(model.flash, Meter(), "demo", chat=False)
        collector = FlashCollector(watched)
        model.flash.stats = Stats(hits=5)
        scrape(watched, collector)
        model.flash.stats = Stats(hits=3)
        found = samples(scrape(watched, collector).decode())
    assert found["mlx_flash_unit_hits_total",] == 5


def get(port, path):
    from urllib.request import urlopen

    with urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return answer.read().decode()
