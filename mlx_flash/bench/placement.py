"""What placing neurons by co-activation saves in reads, on real activations.

A flash folder's neurons are placed along their co-activations on one half of a text,
and the other half is played through the engine's slots and reader from permuted copies
of the bundles: the same neurons, the same slots, another order on flash. Rows differ in
placement and in the gap that the reader reads over; they take turns, a block of tokens
each.
"""

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated

import click
import numpy as np

from ..converters.calibrate.placement import order_by_coactivation
from ..demo_models import DEMO_MODEL
from ..loading import READ_THREADS, load
from ..memory.policies import Lrfu, Lru
from ..storage.limits import PAGE_BYTES
from ..storage.manifest import Layer
from ..storage.reader import open_reader
from ..storage.safetensors import read_header
from ..traces.trace import Trace
from ..tracing import record_text
from .landing import bundled
from .methods import slots_player
from .options import TEXT, Count, DemoModel, Memory, Text
from .report import Column, Report, cache_state, progress

POLICIES = {"lru": Lru, "lrfu": Lrfu}
GAPS = (0, 1, 4)  # pages that are read over
COLUMNS = [
    Column("reads per token", "reads_per_token", 1, 1),
    Column("KB per token", "bytes_per_token", 1e3),
    Column("KB per read", "bytes_per_read", 1e3, 2),
    Column("neurons per read", "units_per_read", 1, 2),
    Column("hit rate %", "hit_rate", 0.01, 1),
    Column("I/O ms", "io_ms", 1, 2),
    Column("median", "median_io_ms", 1, 2),
]


def run(
    text: Text,
    place_text: Annotated[
        Path | None, TEXT, "Text to place by.  [default: the first half of TEXT]"
    ] = None,
    model: DemoModel = DEMO_MODEL,
    memory: Memory = "50%",
    tokens: Annotated[Count, "Played."] = 1024,
    place_tokens: Annotated[Count, "Placed by."] = 8192,
    policy: Annotated[str, click.Choice(list(POLICIES))] = "lru",
    rounds: Annotated[Count, "Blocks of the tokens."] = 8,
) -> Report:
    """Orders of a model's neurons on flash, played with TEXT at equal memory.

    \b
    Example:
      mlx-flash bench placement valid.txt --place-text train.txt
    """
    words = text.read_text()
    half = len(words) // 2
    learn = place_text.read_text() if place_text else words[:half]
    with load(model, memory=memory, context=128) as (net, tokenizer):
        learned = record_text(net, tokenizer, learn, place_tokens)
        played = record_text(net, tokenizer, words[half:], tokens)
        manifest, slots = net.flash.manifest, min(net.flash.budget.slots)
    layers = manifest.layers
    steps = [[units for units, *_ in played.steps(i)] for i in range(len(layers))]
    count = len(steps[0])
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=".")))
        players = []
        for name, orders in placements(learned).items():
            copies = [
                permuted_copy(layer, model, order, place / f"{name}_{i}.safetensors")
                for i, (layer, order) in enumerate(zip(layers, orders, strict=True))
            ]
            # The step's neurons by the places they have in the copy.
            moved = [
                [np.sort(np.argsort(order)[units]) for units in layer_steps]
                for order, layer_steps in zip(orders, steps, strict=True)
            ]
            for pages in GAPS:
                reader = open_reader(READ_THREADS, max_gap_bytes=pages * PAGE_BYTES)
                stack.enter_context(reader)
                player = slots_player(
                    f"{name}, {pages * PAGE_BYTES // 1024} KiB",
                    copies,
                    [bundled(layer, place) for layer in copies],
                    slots,
                    moved,
                    POLICIES[policy](),
                    reader,
                    memory_bytes=0,
                )
                players.append(player)
        ends = np.linspace(0, count, rounds + 1).astype(int)
        for length in progress(np.diff(ends).tolist(), "measuring", "block"):
            for player in players:
                player.play(length)
        direct = reader.direct
    note = (
        f"{count} tokens of {text.name}, {slots} slots of {layers[0].units} "
        f"neurons a layer, {policy}; placed by {place_tokens} other "
        f"tokens. ± is the deviation over tokens; {cache_state(direct)}."
    )
    rows = [player.row() for player in players]
    return Report("placement, gap", rows, COLUMNS, [note], {"slots": slots})


def placements(learned: Trace) -> dict[str, list[np.ndarray]]:
    """Orders of each layer's neurons: as they are, and by what fires together."""
    return {
        "checkpoint": [np.arange(units) for units in learned.units],
        "co-activation": [
            order_by_coactivation(bits, units)
            for bits, units in zip(learned.bits, learned.units, strict=True)
        ],
    }


def permuted_copy(layer: Layer, folder: Path, order: np.ndarray, path: Path) -> Layer:
    """Write the layer's file with its bundles in another order; describes the copy."""
    source = folder / layer.file
    content = source.read_bytes()
    _, start = read_header(source)
    end = start + layer.units * layer.unit_bytes
    bundles = np.frombuffer(content[start:end], np.uint8)
    bundles = bundles.reshape(layer.units, layer.unit_bytes)
    path.write_bytes(content[:start] + bundles[order].tobytes() + content[end:])
    return dataclasses.replace(layer, file=path.name)
