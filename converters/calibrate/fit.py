"""Fit a layer's predictor to the activations that calibration recorded.

The start is the best low-rank stand-in for the projection that decides (the gate where
there is one, else the up projection) on real inputs: with W its weight and U the
r leading principal directions of the pre-activations X·Wᵀ, it is U·(UᵀW), which loses
least of the pre-activations' variance of all rank-r matrices. From there both factors
and the bias are trained to tell active from inactive neurons, both counting alike as in
LLM in a flash (section 3.2). The threshold comes last, on tokens not trained on.
Shapes: T tokens, D model width, N neurons, r rank.
"""

import math
from collections.abc import Iterable, Iterator

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ...arrays import parameters
from ...layers.dense import hidden_values
from ...layers.predictor import Predictor, possible_bits
from ...layers.projections import deciding_rows
from ...storage.manifest import PredictorFacts

BATCH = 256
RATE = 0.01  # Adam's step, relative to the size of what it trains
START_TOKENS = 4096  # enough for the principal directions

Weights = dict[str, mx.array]
Outcome = tuple[mx.array, mx.array]  # hidden values and predicted scores, [T, N]


def split(tokens: int, length: int) -> tuple[slice, slice, slice]:
    """Rows to train on, to choose the threshold on, and to report on (80/10/10 %).

    Whole sequences of `length`, so that neighbours do not tell about each other.
    """
    sequences = tokens // length
    held = max(round(sequences * 0.1), 1) if sequences > 2 else 0
    ends = [(sequences - 2 * held) * length, (sequences - held) * length, tokens]
    if not held:  # too little text to hold any back
        return slice(0, tokens), slice(0, tokens), slice(0, tokens)
    return slice(0, ends[0]), slice(ends[0], ends[1]), slice(ends[1], ends[2])


def fit_predictor(
    inputs: np.ndarray,
    ffn: nn.Module,
    dtype: mx.Dtype,
    length: int,
    rank: int,
    threshold: float | None = None,
    recall: float = 0.95,
    steps: int = 400,
    seed: int = 0,
) -> tuple[Weights, PredictorFacts]:
    """Fit and measure one layer's predictor.

    Args:
        inputs: What the FFN was given, [T, D] float32, sequences of `length` tokens.
        ffn: The FFN with its weights in float32.
        dtype: Of the predictor's arrays.
        rank: r.
        threshold: A probability, as in the paper; None finds the one that gives
            `recall` of the active neurons.
        steps: At least; two passes are made where there is more text.

    Returns:
        Its arrays (`reduce` [r, D], `expand` [N, r], `bias` [N], in `dtype` or
        quantised from it), and what it does on held-out tokens.
    """
    train, choose, test = split(len(inputs), length)
    up, up_bias = deciding_rows(ffn)
    active = _active(inputs[train], ffn)
    weights = _start(inputs[train], up, up_bias, rank, seed)
    weights = _train(weights, inputs[train], active, steps, seed)

    predictor = Predictor(up.shape[1], len(up), rank)
    stored = {k: w.astype(dtype) for k, w in weights.items()}
    predictor.load_weights(list(stored.items()))
    bits = possible_bits(up.shape[1], rank)
    if bits:
        predictor.quantize(bits)

    def outcomes(rows: slice) -> Iterator[Outcome]:
        for x in _batches(inputs[rows]):
            yield hidden_values(ffn, x), predictor.scores(x)

    # Threshold and measurement are those of the weights as they are stored.
    if threshold is None:
        cut = _cut_for_recall(outcomes(choose), recall)
    else:
        cut = math.log(threshold / (1 - threshold))
    predictor.bias = (weights["bias"] - cut).astype(dtype)
    probability = 0.5 + 0.5 * math.tanh(cut / 2)  # a sigmoid that does not overflow
    facts = _measure(outcomes(test), rank, bits, probability)
    arrays = parameters(predictor)
    mx.eval(arrays)
    return arrays, facts


def _scores(weights: Weights, x: mx.array) -> mx.array:
    low = x @ weights["reduce.weight"].T
    return low @ weights["expand.weight"].T + weights["bias"]


def _active(inputs: np.ndarray, ffn: nn.Module) -> np.ndarray:
    """Which neurons are active, [T, N/8] packed bits."""
    hidden = (hidden_values(ffn, x) for x in _batches(inputs))
    return np.concatenate([np.packbits(np.array(h != 0), axis=1) for h in hidden])


def _start(
    inputs: np.ndarray, up: mx.array, up_bias: mx.array, rank: int, seed: int
) -> Weights:
    """The low-rank stand-in described above, by subspace iteration."""
    step = max(len(inputs) // START_TOKENS, 1)
    x = mx.array(inputs[::step])
    mean = x.mean(axis=0)
    x = x - mean
    spare = min(rank + 16, *up.shape, *x.shape)
    q = mx.random.normal((up.shape[0], spare), key=mx.random.key(seed))
    for _ in range(4):
        q = up @ (x.T @ (x @ (up.T @ q)))
        q = mx.array(np.linalg.qr(np.array(q))[0])
    # Within the subspace, the leading directions first.
    small = np.array(x @ (up.T @ q))
    turn = np.linalg.svd(small, full_matrices=False)[2][:rank].T
    u = q @ mx.array(turn)
    reduce, expand = u.T @ up, u
    if reduce.shape[0] < rank:  # less text than rank: the rest starts at nothing
        lack = rank - reduce.shape[0]
        reduce = mx.concatenate([reduce, mx.zeros((lack, up.shape[1]))])
        expand = mx.concatenate([expand, mx.zeros((up.shape[0], lack))], axis=1)
    bias = up @ mean + up_bias - expand @ (reduce @ mean)
    # Scores become log-odds: their spread is brought to what a sigmoid resolves, and
    # shared by both factors so that one learning rate suits them.
    spread = mx.sqrt(mx.mean(mx.square(x @ up.T))).item() or 1.0
    gain = 3.0 / spread
    return {
        "reduce.weight": reduce,
        "expand.weight": expand * gain,
        "bias": bias * gain,
    }


def _train(
    weights: Weights, inputs: np.ndarray, active: np.ndarray, steps: int, seed: int
) -> Weights:
    units = len(weights["bias"])
    share = np.unpackbits(active, axis=1, count=units).mean()
    share = min(max(share, 1e-4), 1 - 1e-4)
    size = {k: mx.sqrt(mx.mean(mx.square(w))).item() or 1.0 for k, w in weights.items()}
    size["bias"] = 3.0
    steps = max(steps, 2 * len(inputs) // BATCH)
    optimizer = optim.Adam(learning_rate=optim.cosine_decay(RATE, steps))

    def loss(scaled: Weights, x: mx.array, target: mx.array) -> mx.array:
        scores = _scores({k: w * size[k] for k, w in scaled.items()}, x)
        weight = mx.where(target, 0.5 / share, 0.5 / (1 - share))
        return nn.losses.binary_cross_entropy(scores, target, weight)

    step = mx.value_and_grad(loss)
    scaled = {k: w / size[k] for k, w in weights.items()}
    rng = np.random.default_rng(seed)
    batch = min(BATCH, len(inputs))
    for _ in range(steps):
        rows = rng.choice(len(inputs), batch, replace=False)
        bits = np.unpackbits(active[rows], axis=1, count=units)
        _, grads = step(scaled, mx.array(inputs[rows]), mx.array(bits.astype(bool)))
        scaled = optimizer.apply_gradients(grads, scaled)
        mx.eval(scaled, optimizer.state)
    return {k: w * size[k] for k, w in scaled.items()}


def _cut_for_recall(outcomes: Iterable[Outcome], recall: float) -> float:
    """The score that `recall` of the active neurons exceed."""
    found = np.concatenate(
        [np.array(scores)[np.array(h != 0)] for h, scores in outcomes]
    )
    return float(np.quantile(found, 1 - recall)) if len(found) else 0.0


def _measure(
    outcomes: Iterable[Outcome], rank: int, bits: int, threshold: float
) -> PredictorFacts:
    active = predicted = both = mass = kept = cells = 0.0
    for h, scores in outcomes:
        guess = scores > 0
        active += float((h != 0).sum())
        predicted += float(guess.sum())
        both += float(((h != 0) & guess).sum())
        mass += float(mx.abs(h).sum())
        kept += float(mx.abs(h * guess).sum())
        cells += h.size
    return PredictorFacts(
        rank=rank,
        bits=bits,
        threshold=threshold,
        recall=both / active if active else 1.0,
        precision=both / predicted if predicted else 1.0,
        mass=kept / mass if mass else 1.0,
        predicted_share=predicted / cells,
        active_share=active / cells,
    )


def _batches(inputs: np.ndarray) -> Iterator[mx.array]:
    for start in range(0, len(inputs), BATCH):
        yield mx.array(inputs[start : start + BATCH])
