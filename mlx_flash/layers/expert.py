"""Mixture-of-experts layers whose experts are on flash.

mlx-lm's own `SwitchGLU` or `SwitchMLP` does the multiplying: for each call its weights
are exchanged for slots, and it is given slot numbers instead of expert numbers.
Activations, biases, quantisation and sorting stay its business, and so the result is
its result.
Shapes: T tokens, K experts of each token, D model width.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)

from ..memory.slot_cache import Wave
from .base import (
    FlashFFN,
    NoSuchWeight,
    each,
    hide,
    join,
    with_children,
)

SWITCHES = (SwitchGLU, SwitchMLP)
LINEARS = (SwitchLinear, QuantizedSwitchLinear)

# From so many (token, expert) pairs on, mlx-lm sorts them and uses another kernel.
SORT_PAIRS = 64
# From so many sorted pairs for each expert on, Metal multiplies packed weights by
# another kernel.
PAIRS_OF_AN_EXPERT = 4


def switch_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every switch layer of a model by its path, in the order of the layers."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, SWITCHES)}

    def order(path: str) -> list[tuple[int, str]]:
        return [(int(p) if p.isdigit() else -1, p) for p in path.split(".")]

    return dict(sorted(found.items(), key=lambda item: order(item[0])))


def switch_parts(switch: nn.Module) -> dict[str, mx.array]:
    """Every array of a switch layer by name, [experts, …]: weights, scales, biases."""
    parts: dict[str, mx.array] = {}
    for name, linear in switch.children().items():
        if isinstance(linear, LINEARS):
            parts |= {
                f"{name}.{key}": value
                for key, value in linear.items()
                if isinstance(value, mx.array)
            }
    return parts


class ExpertFFN(NoSuchWeight, FlashFFN):
    """A switch layer that has its experts brought when the router chose them."""

    apart = 1.0  # experts in memory are always multiplied while others are read

    def __init__(self, switch: nn.Module):
        super().__init__()
        self.dims = _input_dims(switch)
        self.experts = len(next(iter(switch_parts(switch).values())))
        children = {}
        for name, child in switch.children().items():
            if isinstance(child, LINEARS):
                arrays = [k for k, v in child.items() if isinstance(v, mx.array)]
                children[name] = with_children(child, dict.fromkeys(arrays))
            else:
                self[name] = child  # Muse Spark keeps a norm beside the projections
        self._linears = tuple(children)
        self._packed = any(
            isinstance(child, QuantizedSwitchLinear)
            for child in switch.children().values()
        )
        self.on_flash = frozenset(children)
        hide(self, "_switch", with_children(switch, children))

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """The outputs [..., K, D] of the experts `indices` [..., K] of x [..., D]."""
        tokens = x.reshape(-1, x.shape[-1])
        indices = self.part.agreed(indices)
        if self._watcher is not None:
            self._watcher(tokens, indices.reshape(len(tokens), -1))
        if self.slots.holds_all:
            y = self._held(tokens, indices.reshape(len(tokens), -1))
        else:
            y = self._stream(tokens, indices)
        return self.part.sum(y.reshape(*indices.shape, -1))

    def _held(self, x: mx.array, indices: mx.array) -> mx.array:
        """The outputs [T, K, D] where no expert of this machine has to be read.

        Experts of other machines give zeros. The host does not look which ones these
        are, so any expert is multiplied in their place.
        """
        if not self.part.shared:
            return join(self._tokens(x, indices))
        places = mx.array(self.part.places(np.arange(self.experts)))[indices]
        slots = mx.maximum(places, 0).astype(mx.uint32)
        return mx.where((places >= 0)[..., None], join(self._tokens(x, slots)), 0)

    def _stream(self, x: mx.array, indices: mx.array) -> mx.array:
        """The same of x [T, D], as [T, K, D] or [T * K, D].

        What experts of other machines would give is zero.
        """
        guess = None
        if indices.size < SORT_PAIRS:  # a prompt needs most experts anyway
            guess = self.guess_next(x, indices.shape[-1])
        soon = self.expected(x)
        self.slots.wait_for(indices, guess, soon)
        chosen = self.part.places(np.asarray(indices).reshape(len(x), -1))
        pairs, K = chosen.reshape(-1), chosen.shape[-1]
        needed = np.unique(pairs[pairs >= 0]).astype(np.intp)
        elsewhere = (pairs < 0).any()
        if not len(needed):
            self.read_next(guess)
            return self._nothing(x, len(pairs))
        done: list[np.ndarray] = []

        def multiply(outputs: list[mx.array] | None, wave: Wave) -> list[mx.array]:
            if len(wave.units) == len(needed) and not elsewhere:
                return self._tokens(x, mx.array(wave.slots_of(chosen), mx.uint32))
            mine = np.flatnonzero(np.isin(pairs, wave.units))
            _, most = self._pairs_of_a_call(len(pairs), K)
            batches = np.array_split(mine, -(-len(mine) // most))
            done.extend(batches)

            def compute(i: int, batch: np.ndarray) -> mx.array:
                slots = wave.slots_of(pairs[batch])
                return self._pairs(x, batch // K, slots, len(pairs), K)

            return [*(outputs or []), *each(batches, compute)]

        def finish(outputs: list[mx.array]) -> mx.array:
            y = join(outputs)
            if not done:
                return y
            rows = np.full(len(pairs), len(y), np.intp)
            rows[np.concatenate(done)] = np.arange(len(y))
            if elsewhere:
                y = mx.concatenate([y, mx.zeros((1, y.shape[-1]), y.dtype)])
            return y[mx.array(rows)]

        last = pairs[-K:]
        return self.slots.run(
            needed,
            multiply,
            tokens=len(x),
            soon=None if soon is None else np.asarray(soon),
            keep=np.unique(last[last >= 0]),  # the next token needs some of the last's
            meanwhile=lambda: self.read_next(guess),
            finish=finish,
        )

    def _nothing(self, x: mx.array, rows: int) -> mx.array:
        """Zeros [rows, D] as the experts give them, where none of this machine's is
        asked for."""
        like = self._bound()(x[:1], mx.zeros((1, 1), mx.uint32))  # never evaluated
        return mx.zeros((rows, like.shape[-1]), like.dtype)

    def _tokens(self, x: mx.array, slots: mx.array) -> list[mx.array]:
        """The outputs [t, K, D] of all tokens x [T, D], whose experts are all there."""
        bound, K = self._bound(), slots.shape[-1]
        least, most = self._pairs_of_a_call(slots.size, K)
        count = min(-(-slots.size // most), max(slots.size // max(least, 1), 1))
        cuts = [len(x) * i // count for i in range(1, count)]
        of_batch = mx.split(slots, cuts)
        of_x = list(mx.split(x, cuts))
        return each(of_x, lambda i, rows: bound(rows, of_batch[i]))

    def _pairs_of_a_call(self, total: int, K: int) -> tuple[int, int]:
        """(least, most) pairs of a token and an expert to multiply at once.

        On a GPU kernels round differently, and MLX chooses one by the pairs of a call
        and by how many experts its weights have, which are fewer here. So that it is
        the one that it takes for all `total` pairs and all experts, a call has enough
        pairs, or few enough. (`GatherQMM::eval_gpu` of MLX 0.32; pairs are sorted by
        mlx-lm from 64 on.)
        """
        least, most = 0, self.batch_tokens * K
        if mx.default_device() != mx.gpu:  # one kernel, and pairs too many are work
            return least, max(most, 1)
        if total >= SORT_PAIRS:
            least = SORT_PAIRS
        if self._packed:
            limit = PAIRS_OF_AN_EXPERT * self.slots.n_slots
            if total // self.experts >= PAIRS_OF_AN_EXPERT:
                least = max(least, limit)
            else:  # unsorted pairs never go to the other kernel
                least, most = 0, min(most, max(limit, SORT_PAIRS) - 1)
        return least, max(most, least, 1)

    def _pairs(
        self, rows: mx.array, tokens: np.ndarray, slots: np.ndarray, total: int, K: int
    ) -> mx.array:
        """The outputs [P, D] of P pairs of a token and an expert's slot.

        Where mlx-lm would have sent more pairs, a short wave is filled up.
        """
        count = len(tokens)
        least, _ = self._pairs_of_a_call(total, K)
        if count < least:
            tokens = np.resize(tokens, least)
            slots = np.resize(slots, least)
        y = self._bound()(rows[mx.array(tokens)], mx.array(slots[:, None], mx.uint32))
        return y[:count, 0]

    def _bound(self) -> nn.Module:
        """mlx-lm's own module with the slots as its weights, for one call."""
        arrays: dict[str, dict[str, mx.array]] = {name: {} for name in self._linears}
        for part, array in self.slots.parts.items():
            name, key = part.rsplit(".", 1)
            arrays[name][key] = array
        children = {
            name: with_children(self._switch[name], of_linear)
            for name, of_linear in arrays.items()
        }
        return with_children(self._switch, children)


def _input_dims(switch: nn.Module) -> int:
    """D, which the first linear layer of a switch has as its input width."""
    linear = next(c for c in switch.children().values() if isinstance(c, LINEARS))
    width = linear.weight.shape[-1]
    if isinstance(linear, QuantizedSwitchLinear):
        return width * 32 // linear.bits
    return width
