"""Order a layer's neurons on flash so that those that fire together lie together.

A read costs more by being a read than by its length, so neighbours that are wanted by
the same token should share one. The number of reads is the number of neurons less the
number of wanted neighbours: with each neuron placed once, the best order is the path
through all neurons whose links have the largest sum of co-activations. It is built as
in Neuralink (arXiv 2410.19274), heaviest links first, merging chains. (The paper on
which this package rests bundled each neuron with its closest friend instead, which
stored and read the hot neurons again and again.)
Any order gives the same model: rows, columns, biases and predictor outputs permuted.
Shapes: T tokens, N neurons, k partners.
"""

import numpy as np

PARTNERS = 32  # kept of each neuron in a round; 64 gave 0.6 % more links, 8 2 % fewer
BLOCK_NEURONS = 2048  # rows of the co-activation matrix at a time: 134 MB for N 16,384
BLOCK_TOKENS = 1024


def order_by_coactivation(
    active_bits: np.ndarray, units: int, **sizes: int
) -> np.ndarray:
    """The order in which to store a layer's neurons.

    The bits may as well say what was predicted, or what a cache had to read.

    Args:
        active_bits: Which neurons each token used, uint8 [T, ceil(N / 8)], packed as
            `np.packbits` does.
        units: N.
        **sizes: `partners`, `block_neurons` and `block_tokens` if not as above.

    Returns:
        int64 [N], each neuron once: place i on flash is for neuron `order[i]`.
    """
    if active_bits.ndim != 2 or active_bits.shape[1] != -(-units // 8):
        raise ValueError(f"bits {active_bits.shape} are not those of {units} neurons")
    chains = _Chains(units)
    while chains.count > 1:
        open_ends = np.flatnonzero(chains.links < 2)
        heavy = _heaviest_links(
            active_bits, units, open_ends, chains.other_end, **sizes
        )
        # The heaviest of all is always possible, so every round makes progress. The
        # next one asks the ends that are left, far fewer, for partners again.
        if not len(heavy):
            break
        for a, b in heavy.tolist():
            chains.link(a, b)
    return chains.order()


class _Chains:
    """Paths over neurons that grow by linking their ends."""

    def __init__(self, units: int):
        self.links = np.zeros(units, np.int8)
        self.other_end = np.arange(units)  # of the chain that ends here
        self.neighbours: list[list[int]] = [[] for _ in range(units)]
        self.count = units

    def link(self, a: int, b: int) -> None:
        """Join two chains at a and b, unless that is no end or closes a ring."""
        if self.links[a] == 2 or self.links[b] == 2 or self.other_end[a] == b:
            return
        self.neighbours[a].append(b)
        self.neighbours[b].append(a)
        self.links[a] += 1
        self.links[b] += 1
        first, last = self.other_end[a], self.other_end[b]
        self.other_end[first], self.other_end[last] = last, first
        self.count -= 1

    def order(self) -> np.ndarray:
        """All neurons, chain after chain, by the lower end of each."""
        order: list[int] = []
        for start in np.flatnonzero(self.links < 2).tolist():
            if self.other_end[start] < start:
                continue  # written from its lower end
            before, here = -1, start
            while True:
                order.append(here)
                ahead = [n for n in self.neighbours[here] if n != before]
                if not ahead:
                    break
                before, here = here, ahead[0]
        return np.array(order, np.int64)


def _heaviest_links(
    bits: np.ndarray,
    units: int,
    among: np.ndarray,
    other_end: np.ndarray,
    partners: int = PARTNERS,
    block_neurons: int = BLOCK_NEURONS,
    block_tokens: int = BLOCK_TOKENS,
) -> np.ndarray:
    """Links of neurons `among` with their most co-active partners, heaviest first.

    Links within a chain and between neurons that never fired together are left out.
    """
    k = min(partners, len(among) - 1)
    place = np.full(units, -1)
    place[among] = np.arange(len(among))
    own_other = place[other_end[among]]
    pairs, weights = [], []
    for start in range(0, len(among), block_neurons):
        stop = min(start + block_neurons, len(among))
        # For how many tokens both fired: float32 is exact to 2**24.
        counts = np.zeros((stop - start, len(among)), np.float32)
        for first in range(0, len(bits), block_tokens):
            fired = np.unpackbits(
                bits[first : first + block_tokens], axis=1, count=units
            )
            # `take` is nine times faster here than indexing.
            others = fired.take(among, axis=1).astype(np.float32)
            counts += others[:, start:stop].T @ others
        rows = np.arange(stop - start)
        counts[rows, rows + start] = 0
        counts[rows, own_other[start:stop]] = 0
        best = np.argpartition(counts, -k, axis=1)[:, -k:]
        weight = np.take_along_axis(counts, best, axis=1)
        row, column = np.nonzero(weight)
        found = among[start + row], among[best[row, column]]
        pairs.append(np.stack(found, axis=1))
        weights.append(weight[row, column])
    heaviest = np.argsort(-np.concatenate(weights), kind="stable")
    return np.concatenate(pairs)[heaviest]
