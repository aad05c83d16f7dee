"""How fast MLX multiplies, copies and steps through layers on this machine.

A token goes through every weight once, so its time is bytes of weights by a rate; a
prompt's many tokens are bound by arithmetic instead. Both are measured for each kind of
weights, on arrays that grow until a run takes some milliseconds.
Shapes: T tokens, D model width, N neurons.
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..layers.row_kernel import Rows, rows_into, rows_out
from ..memory.policies import Lru
from ..memory.slot_cache import SlotCache
from ..profile import Rate

WIDTH = 2048
LEAST_ROWS = 64
MAX_BYTES = 1 << 27  # of an array: more than any processor's own caches hold
PROMPT = 32  # tokens of a prompt's chunk
ROW = 64  # operations whose waits are timed together
RUN_S = 0.01  # how long one timed run should take
REPEATS = 3
DTYPES = ("float32", "float16", "bfloat16")
WIDTHS = (0, 4, 8)
GROUP = 64
NAMES = ("weight", "scales", "biases")


class Run(NamedTuple):
    """A product to be timed, and the weights that one token goes through in it."""

    once: Callable[[], mx.array]
    nbytes: int
    values: int


def measure_rates(budget_s: float = 10.0) -> list[Rate]:
    """Every kernel that this MLX device has, for each dtype and packing.

    On a slow or busy machine the last ones are left out, when the time is used.
    """
    rates: list[Rate] = []
    begin = time.perf_counter()
    for dtype in DTYPES:
        for bits in WIDTHS:
            for name, make in KERNELS.items():
                if rates and time.perf_counter() - begin > budget_s:
                    return rates
                # gather_mm has float32 alone on the CPU.
                with contextlib.suppress(RuntimeError, ValueError):
                    one_s, one = _timed(make, dtype, bits, 1)
                    many_s, many = _timed(make, dtype, bits, PROMPT)
                    flops_per_s = 2 * PROMPT * many.values / many_s
                    token_bytes_per_s = one.nbytes / one_s
                    rates.append(
                        Rate(name, dtype, bits, token_bytes_per_s, flops_per_s)
                    )
    return rates


def memory_bytes_per_s() -> float:
    """Copying speed; bytes read and bytes written both count."""
    array = mx.zeros((MAX_BYTES // 4,), mx.float32)
    return 2 * array.nbytes / _typical(lambda: array + 1)


def layer_s(layers: int = 8) -> float:
    """Seconds for a decoding step of a layer whose weights weigh nothing.

    A Llama of width 64, evaluated once: what waits in between cost is counted apart.
    """
    from mlx_lm.models import llama
    from mlx_lm.models.cache import make_prompt_cache

    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=layers,
        intermediate_size=64,
        num_attention_heads=2,
        rms_norm_eps=1e-6,
        vocab_size=64,
    )
    model = llama.Model(args)
    mx.eval(model.parameters())
    cache = make_prompt_cache(model)

    def step():
        h = model.model.embed_tokens(mx.array([[1]]))
        for layer, entry in zip(model.layers, cache, strict=True):
            h = layer(h, None, cache=entry)
        return h

    return _typical(step, 20) / layers


def wait_costs() -> tuple[float, float]:
    """Seconds of (a wait of the host for MLX, one more operation without a wait).

    A row of tiny operations is evaluated one by one, begun one by one and evaluated at
    the end, and evaluated as a whole. A wait is what the first takes longer than the
    second.
    """
    waiting = _row_s(mx.eval)
    begun = _row_s(mx.async_eval)
    whole = _row_s(lambda x: None)
    return max(waiting - begun, 0.0), whole


def _row_s(after_each: Callable[[mx.array], object]) -> float:
    """Seconds of each of `ROW` operations that need one another's results."""

    def row() -> mx.array:
        x = mx.zeros((64,))
        for _ in range(ROW):
            x = x + 1
            after_each(x)
        return x

    return _typical(row, 20) / ROW


def cache_costs() -> tuple[float, float]:
    """Seconds of a layer's slot bookkeeping: (for any layer, more for each slot)."""
    few, many = 16, 4096
    small, large = _bookkeeping_s(few), _bookkeeping_s(many)
    per_slot = max((large - small) / (many - few), 0.0)
    return max(small - few * per_slot, 0.0), per_slot


def _bookkeeping_s(slots: int) -> float:
    """An LRU of a quarter of the units, of which a token selects a tenth."""
    rng = np.random.default_rng(0)
    units, count = 4 * slots, max(slots * 4 // 10, 1)
    cache = SlotCache(units, slots, Lru())
    choices = [np.sort(rng.permutation(units)[:count]) for _ in range(40)]
    times = []
    for chosen in choices:
        begin = time.perf_counter()
        for wave in cache.waves(chosen):
            cache.arrived(wave.missing_slots)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _timed(
    make: Callable[..., Run], dtype: str, bits: int, tokens: int
) -> tuple[float, Run]:
    """(seconds of a run, the run) of as many rows as it takes.

    The arrays grow until a run takes `RUN_S`, or are as large as they may be.
    """
    rows = LEAST_ROWS
    while True:
        run = make(rows, dtype, bits, tokens)
        seconds = _typical(run.once, 1)
        more = min(RUN_S / seconds, 16.0, MAX_BYTES / run.nbytes)
        if more < 2:
            return _typical(run.once), run
        rows = int(rows * more) // LEAST_ROWS * LEAST_ROWS


def _matmul(rows: int, dtype: str, bits: int, tokens: int) -> Run:
    x = _filled((tokens, WIDTH), dtype)
    weights = _weights((rows, WIDTH), dtype, bits)
    once = functools.partial(_times, x, weights, bits, True)
    return Run(once, _bytes(weights), rows * WIDTH)


def _gathered(rows: int, dtype: str, bits: int, tokens: int) -> Run:
    """A quarter of the slots in use, as an FFN on flash computes them.

    Rows are copied first, or multiplied where they lie if this device can.
    """
    x = _filled((tokens, WIDTH), dtype)
    up, down = (_weights((4 * rows, WIDTH), dtype, bits) for _ in range(2))
    ids = np.random.default_rng(0).permutation(4 * rows)[:rows]
    chosen = mx.array(np.sort(ids).astype(np.uint32))
    packing = {"group_size": GROUP, "bits": bits, "mode": "affine"} if bits else None
    ins, out = (
        Rows(dict(zip(NAMES, weights, strict=False)), chosen, packing)
        for weights in (up, down)
    )

    def once() -> mx.array:
        return rows_out(mx.maximum(rows_into(x, ins), 0), out)

    return Run(once, (_bytes(up) + _bytes(down)) // 4, 2 * rows * WIDTH)


def _experts(rows: int, dtype: str, bits: int, tokens: int) -> Run:
    """Two of eight experts for one token; for more, every token its own of them."""
    chosen = 2 if tokens == 1 else 1
    weights = _weights((rows, WIDTH), dtype, bits)
    weights = [w.reshape(8, -1, w.shape[-1]) for w in weights]
    mx.eval(weights)
    x = _filled((tokens, 1, 1, WIDTH), dtype)
    picks = np.arange(tokens * chosen) * 8 // (tokens * chosen)
    options: dict[str, Any] = dict(
        rhs_indices=mx.array(picks.reshape(tokens, chosen)), sorted_indices=tokens > 1
    )
    if bits:
        packed, scales, biases = weights
        options |= dict(transpose=True, group_size=GROUP, bits=bits)
        once = functools.partial(mx.gather_qmm, x, packed, scales, biases, **options)
    else:
        once = functools.partial(
            mx.gather_mm, x, weights[0].swapaxes(-1, -2), **options
        )
    return Run(once, _bytes(weights) * chosen // 8, rows * WIDTH * chosen // 8)


KERNELS = {"matmul": _matmul, "gathered": _gathered, "experts": _experts}


def _times(
    x: mx.array, weights: list[mx.array], bits: int, transpose: bool
) -> mx.array:
    if not bits:
        return x @ (weights[0].T if transpose else weights[0])
    packed, scales, biases = weights
    return mx.quantized_matmul(x, packed, scales, biases, transpose, GROUP, bits)


def _weights(shape: tuple[int, int], dtype: str, bits: int) -> list[mx.array]:
    """Weights of one value: how long a product takes does not depend on values."""
    rows, width = shape
    weights = [_filled(shape, dtype)]
    if bits:
        packed = mx.full((rows, width * bits // 32), 0x76543210, mx.uint32)
        groups = (rows, width // GROUP)
        weights = [packed, _filled(groups, dtype), _filled(groups, dtype)]
    mx.eval(weights)
    return weights


def _filled(shape: tuple[int, ...], dtype: str) -> mx.array:
    return mx.full(shape, 0.01, getattr(mx, dtype))


def _bytes(weights: list[mx.array]) -> int:
    return sum(w.nbytes for w in weights)


def _typical(run: Callable, repeats: int = REPEATS) -> float:
    """Median seconds of a run, which other programs' load disturbs least."""
    mx.eval(run())  # compiles kernels, brings pages in
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
