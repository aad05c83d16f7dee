"""Fit a layer's predictor to the activations that calibration recorded.

The start is the best low-rank stand-in for the projection that decides (the gate where
there is one, else the up projection) on real inputs: with W its weight and U the
r leading principal directions of the pre-activations X·Wᵀ, it is U·(UᵀW), which loses
least of the pre-activations' variance of all rank-r matrices. From there both factors
and the bias are trained to tell active from inactive neurons, both counting alike as in
LLM in a flash (section 3.2). The threshold comes last, on tokens not trained on.
Shapes: T tokens, D model width, N neurons, r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from ..layers.dense import hidden_values
from ..layers.predictor import Predictor, possible_bits
from ..layers.projections import projections
from ..storage.manifest import PredictorFacts

BATCH = 256
STEPS = 400  # at least; two passes where there is more text
RATE = 0.01  # Adam's step, relative to the size of what it trains
START_TOKENS = 4096  # enough for the principal directions


@dataclass(frozen=True)
class FitOptions:
    """How predictors are fitted.

    `rank` None takes `default_rank`; `threshold` None finds the one that gives
    `recall` of the active neurons, a number fixes the probability as the paper does.
    """

    rank: int | None = None
    threshold: float | None = None
    recall: float = 0.95


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
    rank: int,
    options: FitOptions,
    length: int,
    seed: int = 0,
) -> tuple[dict[str, mx.array], PredictorFacts]:
    """Fit and measure one layer's predictor.

    Args:
        inputs: What the FFN was given, [T, D] float32, sequences of `length` tokens.
        ffn: The FFN with its weights in float32.
        dtype: Of the predictor's arrays.
        rank: r.

    Returns:
        Its arrays (`reduce` [r, D], `expand` [N, r], `bias` [N], in `dtype` or
        quantised from it), and what it does on held-out tokens.
    """
    train, choose, test = split(len(inputs), length)
    gate = ffn[projections(ffn)[0][0]]
    up, up_bias = gate.weight, gate.get("bias", mx.zeros(len(gate.weight)))

    def hidden(x: np.ndarray) -> mx.array:
        return hidden_values(ffn, mx.array(x))

    active = _active(inputs[train], hidden)
    weights = _start(inputs[train], up, up_bias, rank, seed)
    weights = _train(weights, inputs[train], active, len(up), seed)

    predictor = Predictor(up.shape[1], len(up), rank)
    stored = {k: w.astype(dtype) for k, w in weights.items()}
    predictor.load_weights(list(stored.items()))
    bits = possible_bits(up.shape[1], rank)
    if bits:
        predictor.quantize(bits)

    def scores(x: np.ndarray) -> mx.array:
        return predictor.scores(mx.array(x))

    # Threshold and measurement are those of the weights as they are stored.
    if options.threshold is None:
        cut = _cut_for_recall(inputs[choose], hidden, scores, options.recall)
    else:
        cut = math.log(options.threshold / (1 - options.threshold))
    predictor.bias = (weights["bias"] - cut).astype(dtype)
    facts = _measure(inputs[test], hidden, scores, rank, bits, _sigmoid(cut))
    arrays = dict(tree_flatten(predictor.parameters()))
    mx.eval(arrays)
    return arrays, facts


def _sigmoid(score: float) -> float:
    return 0.5 + 0.5 * math.tanh(score / 2)  # does not overflow


def _scores(weights: dict[str, mx.array], x: mx.array) -> mx.array:
    low = x @ weights["reduce.weight"].T
    return low @ weights["expand.weight"].T + weights["bias"]


def _active(inputs: np.ndarray, hidden) -> np.ndarray:
    """Which neurons are active, [T, N/8] packed bits."""
    return np.concatenate(
        [np.packbits(np.array(hidden(x) != 0), axis=1) for x in _batches(inputs)]
    )


def _start(inputs, up: mx.array, up_bias: mx.array, rank: int, seed: int) -> dict:
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


def _train(weights: dict, inputs, active, units: int, seed: int) -> dict:
    share = np.unpackbits(active, axis=1, count=units).mean()
    share = min(max(share, 1e-4), 1 - 1e-4)
    size = {k: mx.sqrt(mx.mean(mx.square(w))).item() or 1.0 for k, w in weights.items()}
    size["bias"] = 3.0
    steps = max(STEPS, 2 * len(inputs) // BATCH)
    optimizer = optim.Adam(learning_rate=optim.cosine_decay(RATE, steps))

    def loss(scaled: dict, x: mx.array, target: mx.array) -> mx.array:
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


def _cut_for_recall(inputs, hidden, scores, recall: float) -> float:
    """The score that `recall` of the active neurons exceed."""
    found = [np.array(scores(x))[np.array(hidden(x) != 0)] for x in _batches(inputs)]
    found = np.concatenate(found)
    return float(np.quantile(found, 1 - recall)) if len(found) else 0.0


def _measure(
    inputs, hidden, scores, rank: int, bits: int, threshold: float
) -> PredictorFacts:
    active = predicted = both = mass = kept = cells = 0.0
    for x in _batches(inputs):
        h, guess = hidden(x), scores(x) > 0
        active += (h != 0).sum().item()
        predicted += guess.sum().item()
        both += ((h != 0) & guess).sum().item()
        mass += mx.abs(h).sum().item()
        kept += mx.abs(h * guess).sum().item()
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


def _batches(inputs: np.ndarray):
    for start in range(0, len(inputs), BATCH):
        yield inputs[start : start + BATCH]
