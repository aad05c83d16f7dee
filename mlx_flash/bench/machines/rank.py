"""One rank of a run that is measured: `python -m mlx_flash.bench.machines.rank JOB`.

All ranks run this. Rank 0 generates, asks the others what they have counted, and writes
the result to a file; the others follow it and end with it.
"""

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ... import loading
from ...errors import FlashError
from ...machines.lead import LedModel
from .disk import slowed

FAILED = 1


def counters(model: nn.Module) -> list[dict[str, Any]]:
    """What each rank has counted until now, that of rank 0 first."""
    flash = model.flash
    mine = asdict(flash.stats) | {
        "slots": list(flash.budget.slots),
        "peak_bytes": mx.get_peak_memory(),
        **dict.fromkeys(("sums", "sum_bytes", "sum_s"), 0),
    }
    led = flash.machines
    if not isinstance(led, LedModel):
        return [mine]
    group = led.lead.group
    mine |= {"sums": group.sums, "sum_bytes": group.sum_bytes, "sum_s": group.sum_s}
    return [mine, *led.stats()]


def grown(before: list[dict], after: list[dict]) -> list[dict[str, Any]]:
    """What every rank's counters rose by; other figures as they are."""
    fixed = ("slots", "peak_bytes")
    pairs = zip(before, after, strict=True)
    return [
        {k: new[k] if k in fixed else new[k] - old[k] for k in new}
        for old, new in pairs
    ]


def time_sums(model: nn.Module) -> None:
    """Have every rank wait for each of its sums from now on."""
    led = model.flash.machines
    if isinstance(led, LedModel):
        led.lead.tell({"do": "timed", "on": True})
        led.lead.group.timed = True


def measure(job: dict) -> dict:
    """Load, read a prompt, generate; on ranks other than 0 this does not return.

    Every number of ranks gets the same random tokens. The first ones fill slots and are
    not counted, the last ones are those in which sums are timed.
    """
    count = job["tokens"]
    before = job["prompt_tokens"] + job["warm_up"]
    loaded = loading.load_model(
        job["path"],
        job["memory"],
        context=before + 2 * count,
        page_cache="off",
        progress=False,
    )
    with loaded as (model, config):
        cache = make_prompt_cache(model)
        vocabulary = config["vocab_size"]
        ids = np.random.default_rng(0).integers(3, vocabulary, before + 2 * count)

        def step(tokens: np.ndarray) -> float:
            since = time.perf_counter()
            mx.eval(model(mx.array(tokens[None]), cache=cache))
            return time.perf_counter() - since

        step(ids[: job["prompt_tokens"]])
        for i in range(job["prompt_tokens"], before):
            step(ids[i : i + 1])
        start = counters(model)
        seconds = [step(ids[i : i + 1]) for i in range(before, before + count)]
        middle = counters(model)
        time_sums(model)
        for i in range(before + count, len(ids)):
            step(ids[i : i + 1])
        timed = grown(middle, counters(model))
        layers = model.flash.layers
        return {
            "seconds": seconds,
            "ranks": grown(start, middle),
            "sum_s": [rank["sum_s"] for rank in timed],
            "units": sum(layer.part.total(layer.slots.units) for layer in layers),
            "direct_io": model.flash.direct_io,
        }


def main(job: dict) -> None:
    """Measure, and on rank 0 write the result to the job's file."""
    # A rank that nobody ends any more ends by itself.
    signal.alarm(job["limit_s"])
    # Nobody reads it: see `launch._wait`.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if job["disk_rate"]:
        slow = slowed(loading.open_reader, job["disk_rate"])
        loading.open_reader = slow
    try:
        found = measure(job)
    except FlashError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(FAILED)
    Path(job["result"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
