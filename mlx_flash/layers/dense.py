"""Find a model's dense FFNs, and look at what happens between their projections.

Shapes: T tokens, D model width, N neurons.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from .base import given, with_children
from .projections import HALVES, known_projections, projections, rows_per_neuron

PROBE_DIMS, PROBE_NEURONS = 8, 512
# A ReLU of random values is zero half of the time, a smooth activation never.
LEAST_ZEROS = 0.25


def dense_ffns(model: nn.Module) -> dict[str, nn.Module]:
    """Every dense FFN of a model by its path, in the order of the layers.

    One whose neurons depend on each other, as where Gemma 3n keeps those above the
    mean of all, is no sum over its neurons, and not among them.
    """
    found = {n: m for n, m in model.named_modules() if projections(m) and is_sum(m)}

    def order(path: str) -> list[tuple[int, str]]:
        return [(int(p) if p.isdigit() else -1, p) for p in path.split(".")]

    return dict(sorted(found.items(), key=lambda item: order(item[0])))


def hidden_values(ffn: nn.Module, x: mx.array) -> mx.array:
    """What an FFN given x [T, D] hands to its last projection, [T, N]."""
    _, out = known_projections(ffn)
    with _exchanged(ffn, {out: nn.Identity()}):
        return ffn(x)


def hidden_of(ffn: nn.Module, values: Mapping[str, mx.array], out: str) -> mx.array:
    """What an FFN hands to its projection `out` where those into it give `values`."""
    stand_ins = {name: given(array) for name, array in values.items()}
    x = next(iter(values.values()))
    return with_children(ffn, {**stand_ins, out: nn.Identity()})(x)


def is_gated(ffn: nn.Module) -> bool:
    """Whether a hidden value is its up value times an activation of its gate.

    The activation of 0 must be 0: a neuron without its gate then adds nothing.
    """
    ins, out = known_projections(ffn)
    if len(ins) != 2:
        return False
    g, u = mx.random.normal((2, 16, PROBE_NEURONS), key=mx.random.key(0))
    gate, up = ins

    def hidden(gates: mx.array, ups: mx.array) -> mx.array:
        return hidden_of(ffn, {gate: gates, up: ups}, out)

    gained = hidden(g, mx.ones_like(u)) * u
    silent = hidden(mx.zeros_like(g), u)
    linear = mx.allclose(hidden(g, u), gained, 1e-3, 1e-6)
    return bool(linear) and not bool(mx.any(silent))


def gives_zeros(ffn: nn.Module) -> bool:
    """Whether an FFN's activation, whatever it is, makes hidden values exactly zero."""
    return float(mx.mean(_probe(ffn) == 0)) > LEAST_ZEROS


def is_sum(ffn: nn.Module) -> bool:
    """Whether some of the neurons alone give the hidden values they give among all."""
    some = PROBE_NEURONS // 2
    alone, among = _probe(ffn, some), _probe(ffn)[:, :some]
    return alone.shape == among.shape and bool(mx.allclose(alone, among, 1e-3, 1e-6))


def _probe(ffn: nn.Module, neurons: int = PROBE_NEURONS) -> mx.array:
    """Hidden values [16, neurons] of an FFN with narrow random projections.

    The FFN itself computes them, for the first `neurons` of PROBE_NEURONS.
    """
    ins, out = known_projections(ffn)
    *keys, key = mx.random.split(mx.random.key(0), len(ins) + 1)
    narrow: dict[str, nn.Module] = {out: nn.Identity()}
    for name, key_of_rows in zip(ins, keys, strict=True):
        rows = rows_per_neuron(ffn, name, out) or 1
        shape = (PROBE_NEURONS, rows, PROBE_DIMS)
        weight = mx.random.normal(shape, key=key_of_rows)[:neurons]
        if name in HALVES:
            weight = weight.swapaxes(0, 1)
        narrow[name] = linear = nn.Linear(PROBE_DIMS, rows * neurons)
        linear.weight = weight.reshape(-1, PROBE_DIMS)
        linear.bias = mx.zeros(rows * neurons)
    with _exchanged(ffn, narrow):
        return ffn(0.1 * mx.random.normal((16, PROBE_DIMS), key=key))


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
