"""A dense FFN computed from slots: what neurons and blocks have in common.

The model's own FFN module does the computing, activation and gating included. Only its
linear layers are exchanged, for projections over whichever neurons are in memory, so
any FFN that is a sum over its neurons works as it stands in mlx-lm.
Shapes: T tokens, D model width, N neurons, K of them now, n units now, b neurons of a
unit.
"""

from collections.abc import Callable, Mapping
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .adapted import AdaptedInto, AdaptedOutOf
from .base import FlashFFN, NoSuchWeight, each, given, hide, join, with_children
from .projections import (
    HALVES,
    count_neurons,
    input_width,
    known_projections,
    packing,
    rows_per_neuron,
)
from .row_kernel import Rows, rows_into, rows_out

Arrays = Mapping[str, mx.array]
NOTHING: Arrays = {}
# Of a linear layer, as it is or wrapped by mlx-lm's LoRA and DoRA.
WEIGHTS = frozenset(("weight", "scales", "biases", "linear", "lora_a", "lora_b", "m"))
Through = Callable[[mx.array], mx.array]


class Into(NoSuchWeight, nn.Module):
    """A projection into some of the neurons: [T, D] → [T, K]. It holds its bias alone.

    The weight it is given is [n, D] or [n, b, D], a row for each neuron; packed weights
    are packed along D. One with `halves` has a gate and an up row for each neuron,
    [n, 2, b, D], and gives [T, 2K] as the whole of it would: gates first. Where gates
    and ups come in pairs, they are [n, 2b, D] and give [T, 2K].
    """

    on_flash = WEIGHTS

    def __init__(self, linear: nn.Module, rows: int, halves: bool):
        super().__init__()
        self.packing, self.rows, self.halves = packing(linear), rows, halves
        self.width = input_width(linear)
        self.outputs = len(linear.weight)
        if "bias" in linear:
            self.bias = linear.bias

    def to_lora(self, r: int, scale: float, dropout: float) -> nn.Module:
        """mlx-lm asks a module of its own kind to adapt itself by this name."""
        return AdaptedInto(self, r, scale)

    def __call__(
        self,
        x: mx.array,
        arrays: Arrays,
        neurons: mx.array | None,
        ids: mx.array | None = None,
    ) -> mx.array:
        """Project x by `arrays`, or by the rows of them that `ids` names.

        `neurons` says whose biases to add, None for all in order.
        """
        a = {k: v.reshape(-1, v.shape[-1]) for k, v in arrays.items()}
        if ids is not None:
            y = rows_into(x, Rows(arrays, ids, self.packing))
        elif self.packing is None:
            y = x @ a["weight"].T
        else:
            y = mx.quantized_matmul(
                x, a["weight"], a["scales"], a.get("biases"), True, **self.packing
            )
        if self.halves:
            n, T = len(arrays["weight"]), len(x)
            y = y.reshape(T, n, 2, -1).swapaxes(1, 2).reshape(T, -1)
        return y + self.of(neurons, self.bias) if "bias" in self else y

    def of(self, neurons: mx.array | None, values: mx.array) -> mx.array:
        """Of values [..., N'] that belong to its outputs, those of some neurons."""
        if neurons is None:
            return values
        lead = values.shape[:-1]
        if self.halves:
            return values.reshape(*lead, 2, -1)[..., neurons].reshape(*lead, -1)
        rows = values.reshape(*lead, -1, self.rows)
        return rows[..., neurons, :].reshape(*lead, -1)


class OutOf(NoSuchWeight, nn.Module):
    """The projection out of them: [T, K] → [T, D]. It holds its bias, and adds none.

    A float or re-quantised weight is [n, D] or [n, b, D], a row for each neuron. With
    `columns` it is [n, D, b'], the checkpoint's own packing along the neurons.
    """

    on_flash = WEIGHTS

    def __init__(self, linear: nn.Module, columns: bool = False):
        super().__init__()
        self.packing, self.columns = packing(linear), columns
        self.width = input_width(linear)
        self.outputs = len(linear.weight)
        if "bias" in linear:
            self.bias = linear.bias  # added once by the FFN, not once a wave

    def to_lora(self, r: int, scale: float, dropout: float) -> nn.Module:
        """As `Into` has it."""
        return AdaptedOutOf(self, r, scale)

    def __call__(
        self,
        h: mx.array,
        arrays: Arrays,
        neurons: mx.array | None,
        through: Through | None,
        ids: mx.array | None = None,
    ) -> mx.array:
        """Project what `through` makes of the hidden values h; `ids` as `Into` has."""
        if through is not None:
            h = through(h)
        if ids is not None:
            return rows_out(h, Rows(arrays, ids, self.packing))
        if self.columns and self.packing:
            n = len(arrays["weight"])
            h = h.reshape(len(h), n, -1).swapaxes(0, 1)
            y = self._packed(h, arrays, transpose=True)
            return y.astype(mx.float32).sum(axis=0)
        a = {k: v.reshape(-1, v.shape[-1]) for k, v in arrays.items()}
        if self.packing is None:
            return h @ a["weight"]
        return self._packed(h, a, transpose=False)

    def _packed(self, h: mx.array, a: Arrays, transpose: bool) -> mx.array:
        return mx.quantized_matmul(
            h,
            a["weight"],
            a["scales"],
            a.get("biases"),
            transpose,
            **(self.packing or {}),
        )


class SlotFFN(FlashFFN):
    """An FFN module with its projections exchanged for ones over slots.

    Biases and whatever the activation has stay parameters, under their own names.
    """

    def __init__(self, ffn: nn.Module, columns: bool = False):
        super().__init__()
        ins, out = known_projections(ffn)
        self._names = (*ins, out)
        self.neurons = count_neurons(ffn[out])
        for name, child in ffn.children().items():
            if name not in self._names:
                self[name] = child  # an activation, whose scalars are parameters
        for name in ins:
            rows = rows_per_neuron(ffn, name, out)
            self[name] = Into(ffn[name], rows or 1, halves=name in HALVES)
        self[out] = OutOf(ffn[out], columns)
        hide(self, "_ffn", with_children(ffn, dict.fromkeys(self._names)))

    def __call__(self, x: mx.array) -> mx.array:
        tokens = self.batches(x.reshape(-1, x.shape[-1]))
        if self.slots.holds_all:
            parts, here = self.slots.parts, self._neurons_here()

            def compute(_: int, rows: mx.array) -> mx.array:
                known = self.known(rows)
                return self.compute(rows, parts, neurons=here, known=known)

            y = self.finish(each(tokens, compute))
        else:
            y = self.stream(tokens)
        return y.astype(x.dtype).reshape(x.shape)

    def known(self, x: mx.array) -> Arrays:
        """What x [T, D] gives before slots are needed: projections in, [T, N] each."""
        return {}

    def finish(self, totals: list[mx.array]) -> mx.array:
        """All tokens [T, D], with the bias of the last projection if it has one.

        What several machines add up to is summed in float32.
        """
        y, out = join(totals), self[self._names[-1]]
        if self.part.shared:
            y = self.part.sum(y.astype(mx.float32))
        if isinstance(out, AdaptedOutOf):
            out = out.linear
        return y + out.bias if "bias" in out else y

    def neurons_of(self, units: np.ndarray) -> mx.array:
        """The neurons of units that are numbered as the slots number them."""
        width = self.neurons // self.part.total(self.slots.units)
        first = self.part.all_numbers(units)[:, None] * width
        return mx.array((first + np.arange(width)).ravel())

    def _neurons_here(self) -> mx.array | None:
        """Those of all slots of a layer held whole; None for all, in order."""
        if not self.part.shared:
            return None
        return self.neurons_of(np.arange(self.slots.units))

    def stream(self, batches: list[mx.array]) -> mx.array:
        """The finished FFN of batches [t, D] of tokens, units brought as needed.

        What more than one wave adds up to is summed in float32.
        """
        raise NotImplementedError

    def compute(
        self,
        x: mx.array,
        parts: Arrays,
        rows: mx.array | slice | None = None,
        neurons: mx.array | None = None,
        through: Through | None = None,
        known: Arrays = NOTHING,
    ) -> mx.array:
        """The FFN of x [T, D] over some of the slots, without its last bias.

        Args:
            parts: The slots of each part.
            rows: Which slots, as MLX arrays are indexed; None for all.
            neurons: Whose they are; None where all are in order.
            through: Given the hidden values [T, K], says what goes on in their place.
            known: As the method of this name gives it.
        """
        *ins, out = self._names
        bound: dict[str, Callable[..., mx.array]] = {}
        for name in ins:
            if name in known:
                values = known[name]
                bound[name] = given(values if neurons is None else values[:, neurons])
                continue
            arrays, ids = _arrays(parts, name, rows)
            bound[name] = partial(self[name], arrays=arrays, neurons=neurons, ids=ids)
        arrays, ids = _arrays(parts, out, rows)
        bound[out] = partial(
            self[out], arrays=arrays, neurons=neurons, through=through, ids=ids
        )
        return with_children(self._ffn, bound)(x)


def add(total: mx.array | None, part: mx.array) -> mx.array:
    """The sum over waves; of more than one, in float32."""
    return part if total is None else total.astype(mx.float32) + part


def _arrays(
    parts: Arrays, name: str, rows: mx.array | slice | None
) -> tuple[Arrays, mx.array | None]:
    """One projection's parts by their names inside of it, and which rows are meant.

    The second is None where all of them are. Slots of one row each are given whole,
    with the ids of the rows: nothing is copied where there is a kernel.
    """
    start = f"{name}."
    arrays = {k.removeprefix(start): a for k, a in parts.items() if k.startswith(start)}
    if rows is None:
        return arrays, None
    if isinstance(rows, mx.array) and arrays["weight"].ndim == 2:
        return arrays, rows
    return {key: array[rows] for key, array in arrays.items()}, None
