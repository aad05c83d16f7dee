"""Find a model's dense FFNs, and look at what happens between their projections.

Shapes: T tokens, D model width, N neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from .ffn import projections

PROBE_DIMS, PROBE_NEURONS = 8, 512
# A ReLU of random values is zero half of the time, a smooth activation never.
LEAST_ZEROS = 0.25


def dense_ffns(model: nn.Module) -> dict[str, nn.Module]:
    """Every dense FFN of a model by its path, in the order of the layers."""
    found = {n: m for n, m in model.named_modules() if projections(m)}

    def order(path: str) -> list[tuple[int, str]]:
        return [(int(p) if p.isdigit() else -1, p) for p in path.split(".")]

    return dict(sorted(found.items(), key=lambda item: order(item[0])))


def hidden_values(ffn: nn.Module, x: mx.array) -> mx.array:
    """What an FFN given x [T, D] hands to its last projection, [T, N]."""
    out = projections(ffn)[1]
    with _exchanged(ffn, {out: nn.Identity()}):
        return ffn(x)


def gives_zeros(ffn: nn.Module) -> bool:
    """Whether an FFN's activation, whatever it is, makes hidden values exactly zero.

    The FFN itself is asked, with narrow random projections in place of its own.
    """
    ins, out = projections(ffn)
    narrow = {name: nn.Linear(PROBE_DIMS, PROBE_NEURONS) for name in ins}
    keys = iter(mx.random.split(mx.random.key(0), len(ins) + 1))
    for linear in narrow.values():
        linear.weight = mx.random.normal(linear.weight.shape, key=next(keys))
        linear.bias = mx.zeros(PROBE_NEURONS)
    x = 0.1 * mx.random.normal((16, PROBE_DIMS), key=next(keys))
    with _exchanged(ffn, narrow | {out: nn.Identity()}):
        return mx.mean(ffn(x) == 0).item() > LEAST_ZEROS


@contextmanager
def _exchanged(ffn: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
    before = {name: ffn[name] for name in modules}
    for name, module in modules.items():
        ffn[name] = module
    try:
        yield
    finally:
        for name, module in before.items():
            ffn[name] = module
