"""Dense FFNs of any kind whose weights are on flash as blocks of neurons.

An FFN is a sum over its neurons, so it is a sum over blocks of them. All blocks are
needed for every token; those that memory holds are not read again.
Shapes: T tokens, D model width, n blocks, b neurons of each.
"""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import FlashError
from ..memory.slot_cache import Wave
from .base import each
from .projections import HALVES, count_neurons, known_projections, packing
from .slot_ffn import SlotFFN, add

BLOCK_BYTES = 2_000_000  # long enough to read at full speed, short enough to share
LEAST_BLOCKS = 8  # of a layer, also of a small one: memory can hold a share of it


def ffn_arrays(ffn: nn.Module) -> dict[str, mx.array]:
    """What goes to flash: the projections' weights; their biases stay resident."""
    ins, out = known_projections(ffn)
    return {
        f"{name}.{key}": array
        for name in (*ins, out)
        for key, array in ffn[name].items()
        if key != "bias" and isinstance(array, mx.array)
    }


def cut_blocks(ffn: nn.Module, n: int) -> dict[str, mx.array]:
    """The arrays of an FFN cut into n blocks, [n, …] each.

    Ways in are cut by rows, [n, b, D], or [n, 2, b, D] where one holds all gate rows
    before all up rows. The way out is cut by columns: a float column is stored as a
    row, [n, b, D]; a packed one stays in its packing, [n, D, b'].
    """
    ins, out = known_projections(ffn)
    parts = {}
    for key, array in ffn_arrays(ffn).items():
        name, width = key.split(".")[0], array.shape[-1]
        if name == out and packing(ffn[out]):
            parts[key] = array.reshape(len(array), n, -1).swapaxes(0, 1)
        elif name == out:
            parts[key] = array.T.reshape(n, -1, len(array))
        elif name in HALVES:
            parts[key] = array.reshape(2, n, -1, width).swapaxes(0, 1)
        else:
            parts[key] = array.reshape(n, -1, width)
    return parts


def block_parts(ffn: nn.Module) -> dict[str, mx.array]:
    """The arrays of an FFN cut into n blocks, [n, …] each.

    Raises:
        FlashError: If N is no multiple of the quantisation's group size.
    """
    out = ffn[known_projections(ffn)[1]]
    neurons = count_neurons(out)
    group = (packing(out) or {"group_size": 1})["group_size"]
    total = sum(array.nbytes for array in ffn_arrays(ffn).values())
    most = min(BLOCK_BYTES, total // LEAST_BLOCKS)
    size = block_size(neurons, total / neurons, group, most)
    return cut_blocks(ffn, neurons // size)


def block_size(neurons: int, neuron_bytes: float, group: int, unit_bytes: int) -> int:
    """Neurons of a block: the largest divisor that fits `unit_bytes`, whole groups."""
    if neurons % group:
        raise FlashError(f"{neurons} neurons cannot be cut into groups of {group}.")
    sizes = [b for b in range(group, neurons + 1, group) if neurons % b == 0]
    fitting = [b for b in sizes if b * neuron_bytes <= unit_bytes]
    return max(fitting, default=sizes[0])


class BlockFFN(SlotFFN):
    """A dense FFN that is swept block by block, and keeps what fits."""

    apart = 0.0  # all blocks are needed: there are always several waves

    def __init__(self, ffn: nn.Module):
        super().__init__(ffn, columns=True)

    def stream(self, batches: list[mx.array]) -> mx.array:
        slots = self.slots

        def multiply(totals: list[mx.array] | None, wave: Wave) -> list[mx.array]:
            runs = [(run, self.neurons_of(units)) for run, units in _runs(wave)]

            def sum_runs(i: int, x: mx.array) -> mx.array:
                total = totals[i] if totals else None
                for run, neurons in runs:
                    total = add(total, self.compute(x, slots.parts, run, neurons))
                assert total is not None  # a wave has units
                return total

            return each(batches, sum_runs)

        units, tokens = np.arange(slots.units), sum(map(len, batches))
        return slots.run(units, multiply, tokens, finish=self.finish)


def _runs(wave: Wave) -> Iterator[tuple[slice, np.ndarray]]:
    """Slots of a wave that lie side by side, and the units in them."""
    order = np.argsort(wave.slots)
    slots = wave.slots[order]
    breaks = np.flatnonzero(np.diff(slots) > 1) + 1
    units = np.split(wave.units[order], breaks)
    for run, of_run in zip(np.split(slots, breaks), units, strict=True):
        yield slice(int(run[0]), int(run[-1]) + 1), of_run
