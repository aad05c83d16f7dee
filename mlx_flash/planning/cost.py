"""The cost of a token: flash, the bookkeeping of slots, multiplying, waiting for MLX.

The first three are the paper's terms; the last one is what a GPU stands still because
the host has to see what was chosen. They come from the figures of a machine
(`Profile`), the bytes of a model and what its tokens ask for. Everything here is
modelled, nothing is measured. While a layer reads, it multiplies with what memory
holds: so much of the reading's time is hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from ..profile import Profile, Rate
from ..storage.limits import CHUNK_BYTES, MERGE_BYTES, PAGE_BYTES

DEPTH = 32  # reads in flight


@dataclass(frozen=True)
class Matrices:
    """Matrices that a token is multiplied with, by one kernel.

    Attributes:
        kernel, dtype, bits: As in `Rate`.
        nbytes: As they are stored, scales and biases included.
        values: As many as they have unpacked.
    """

    kernel: str
    dtype: str
    bits: int
    nbytes: float
    values: float


@dataclass(frozen=True)
class FlashLayer:
    """One FFN on flash, and what a token asks of it.

    Attributes:
        weights: Of all its units.
        units, unit_bytes: As in the manifest.
        slots: Units that memory holds, from the budget.
        pieces: Reads that a unit takes, 1 where it is a bundle.
        selected: Units that a token needs, on average.
        hit_rate: The share of these that memory holds.
        computed: Units that are multiplied with.
        random: Whether units are selected; False where all are needed, in order.
        merged: Whether neighbours are read together.
        in_place: Whether they lie in a checkpoint's shards, at any offset.
        overlap: Whether what memory holds is multiplied while the rest is read.
        waits: How often the host waits for MLX in a token.
        launches: Operations of MLX besides those of a layer that is held whole.
    """

    weights: Matrices
    units: int
    unit_bytes: float
    slots: int
    pieces: int
    selected: float
    hit_rate: float
    computed: float
    random: bool = True
    merged: bool = True
    in_place: bool = False
    overlap: bool = False
    waits: int = 0
    launches: int = 0

    @property
    def beside(self) -> float:
        """The share of its multiplying that goes on beside its reading."""
        if not self.overlap:
            return 0.0
        if not self.random:
            return 1.0  # a sweep: one half of the slots while the other is read
        return self.hit_rate


@dataclass(frozen=True)
class Work:
    """What a model asks of a machine.

    Attributes:
        resident: Matrices in memory; an embedding table counts where it gives logits.
        layers: FFNs on flash.
        steps: Layers of the model, FFNs and attention together counting as one.
        kv_bytes: Of caches, gone through for each token.
        load_bytes: What is read before the first token.
        blocks: Dense FFNs of a mixture of experts on flash.
        rows: Tables of embeddings on flash.
    """

    resident: tuple[Matrices, ...]
    layers: tuple[FlashLayer, ...]
    steps: int
    kv_bytes: float = 0.0
    load_bytes: float = 0.0
    blocks: tuple[FlashLayer, ...] = ()
    rows: tuple[FlashLayer, ...] = ()


@dataclass(frozen=True)
class Cost:
    """Modelled seconds, bytes, reads and waits of one token or one prompt."""

    io_s: float = 0.0
    cache_s: float = 0.0
    compute_s: float = 0.0
    bytes_read: float = 0.0
    reads: float = 0.0
    wait_s: float = 0.0
    waits: float = 0.0

    @property
    def total_s(self) -> float:
        return self.io_s + self.cache_s + self.compute_s + self.wait_s

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.total_s if self.total_s else math.inf

    def __add__(self, other: Cost) -> Cost:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Cost(*(mine + theirs for mine, theirs in pairs))


def token_bytes(work: Work) -> float:
    """Bytes that one more token reads on average, on any machine."""
    layers = (*work.layers, *work.blocks, *work.rows)
    return sum(_asked(layer, _missing(layer))[0] for layer in layers)


def token_cost(profile: Profile, work: Work) -> Cost:
    """What one more token costs."""
    compute_s = work.steps * profile.layer_s
    compute_s += work.kv_bytes / profile.memory_bytes_per_s
    for weights in work.resident:
        compute_s += weights.nbytes / _rate(profile, weights).bytes_per_s
    total = Cost(compute_s=compute_s)
    for layer in (*work.layers, *work.blocks):
        read = _read(profile, layer, _missing(layer))
        share = layer.computed / layer.units
        rate = _rate(profile, layer.weights)
        compute_s = share * layer.weights.nbytes / rate.bytes_per_s
        hidden_s = min(read.io_s, layer.beside * compute_s)
        compute_s += layer.launches * profile.launch_s
        cost = replace(read, io_s=read.io_s - hidden_s, compute_s=compute_s)
        total += replace(
            cost, wait_s=layer.waits * profile.wait_s, waits=float(layer.waits)
        )
    return total + _rows_cost(profile, work, 1)


def prompt_cost(
    profile: Profile,
    work: Work,
    tokens: int,
    chunk: int,
    held: Sequence[int] | None = None,
) -> Cost:
    """What a prompt costs that is computed `chunk` tokens at a time.

    Neurons and blocks are swept as a whole; of experts, what the chunk's tokens need if
    each chooses at random.

    Args:
        held: Of each layer, how many slots are filled before; None for all.
    """
    filled = [layer.slots for layer in work.layers] if held is None else held
    total = Cost()
    while tokens > 0:
        now = min(tokens, chunk)
        compute_s = work.steps * profile.layer_s
        for weights in work.resident:
            compute_s += _many_s(profile, weights, weights.values * now, weights.nbytes)
        total += Cost(compute_s=compute_s)
        for layer, slots in zip(work.layers, filled, strict=True):
            total += _chunk_cost(profile, layer, now, slots)
        for layer in work.blocks:
            total += _chunk_cost(profile, layer, now, layer.slots)
        total += _rows_cost(profile, work, now)
        filled = [layer.slots for layer in work.layers]
        tokens -= now
    return total


def _chunk_cost(profile: Profile, layer: FlashLayer, tokens: int, held: int) -> Cost:
    """One layer's part of a chunk of a prompt, with so many slots filled before."""
    weights = layer.weights
    by_choice = weights.kernel == "experts"
    needed, pairs = float(layer.units), float(layer.units * tokens)
    if by_choice:
        needed *= 1 - (1 - layer.selected / layer.units) ** tokens
        pairs = layer.selected * tokens
    missing = needed * (1 - held / layer.units)
    read = _read(profile, replace(layer, random=by_choice), missing)
    if weights.kernel == "gathered":
        weights = replace(weights, kernel="matmul")
    nbytes = needed / layer.units * weights.nbytes
    values = pairs / layer.units * weights.values
    return replace(
        read,
        compute_s=_many_s(profile, weights, values, nbytes),
        wait_s=layer.waits * profile.wait_s,
        waits=float(layer.waits),
    )


def _rows_cost(profile: Profile, work: Work, tokens: int) -> Cost:
    """What tables cost that are not held whole: rows of random tokens, and waiting."""
    total = Cost()
    for table in work.rows:
        if table.slots < table.units:
            missing = table.units * (1 - (1 - 1 / table.units) ** tokens)
            read = _read(profile, table, missing)
            total += replace(read, wait_s=profile.wait_s, waits=1.0)
    return total


def load_s(profile: Profile, work: Work) -> float:
    """Seconds to read what stays in memory."""
    return work.load_bytes / profile.sequential_bytes_per_s


def _many_s(profile: Profile, weights: Matrices, values: float, nbytes: float) -> float:
    """Seconds of many tokens: two operations a value, or bound by the bytes."""
    rate = _rate(profile, weights)
    return max(2 * values / rate.flops_per_s, nbytes / rate.bytes_per_s)


def _rate(profile: Profile, weights: Matrices) -> Rate:
    return profile.rate(weights.kernel, weights.dtype, weights.bits)


def _missing(layer: FlashLayer) -> float:
    """Units that a token needs and memory does not hold, on average."""
    if layer.slots >= layer.units:
        return 0.0
    return layer.selected * (1 - layer.hit_rate)


def _read(profile: Profile, layer: FlashLayer, missing: float) -> Cost:
    """Bookkeeping and reads of one layer of which `missing` units are absent.

    If less than one unit is missing on average, most tokens wait for nothing and the
    others wait for a whole unit.
    """
    if layer.slots >= layer.units:
        return Cost()  # held whole, and never asked for
    cache_s = profile.cache_layer_s + profile.cache_slot_s * layer.slots
    if missing <= 0:
        return Cost(cache_s=cache_s)
    nbytes, reads = _asked(layer, missing)
    if not layer.random:
        io_s = nbytes / profile.sequential_bytes_per_s
        return Cost(io_s, cache_s, 0.0, nbytes, reads)
    if profile.copy_bytes_per_s:
        cache_s += missing * layer.unit_bytes / profile.copy_bytes_per_s
    often = 1 - math.exp(-missing)  # how often anything is missing, if by chance
    at_once = reads / often
    depth = min(max(at_once, 1.0), DEPTH)
    speed = profile.read_bytes_per_s(nbytes / reads, depth)
    # The last reads leave the queue half empty: half a read's time is lost on average.
    tail_s = often * 0.5 * depth * (nbytes / reads) / speed
    return Cost(nbytes / speed + tail_s, cache_s, 0.0, nbytes, reads)


def _asked(layer: FlashLayer, missing: float) -> tuple[float, float]:
    """(bytes, reads) that bring `missing` units, neighbours merged, pages whole.

    The missing units lie at random. A grain is what has to be read as a whole: a unit,
    or a page that several short units lie on. `share` of all grains is wanted.
    """
    piece = layer.unit_bytes / layer.pieces
    share, grains = min(missing / layer.units, 1.0), float(layer.units)
    grain_bytes, edge_bytes = piece, 0.0
    if piece < PAGE_BYTES:
        whole = PAGE_BYTES % piece == 0
        together = PAGE_BYTES / piece + (0 if whole else 1)
        share = 1 - (1 - share) ** together
        grains, grain_bytes = max(grains * piece / PAGE_BYTES, 1.0), PAGE_BYTES
    elif layer.random and (piece % PAGE_BYTES or layer.in_place):
        edge_bytes = PAGE_BYTES
    wanted = grains * share
    runs = wanted
    if layer.merged and piece < MERGE_BYTES:
        runs = max(wanted * (1 - share), wanted * grain_bytes / MERGE_BYTES)
    nbytes = (wanted * grain_bytes + runs * edge_bytes) * layer.pieces
    reads = runs * layer.pieces * math.ceil(piece / CHUNK_BYTES)
    return nbytes, reads
