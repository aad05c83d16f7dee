"""Ways to fit the predictors of a model of neurons, compared at equal recall.

Every way is fitted to the same text and judged on another. Each layer's threshold is
then set anew so that the predictor finds exactly the same share of the active neurons
of the other text: what is left to compare is how many neurons it names for that, how
much of the activation they have, and what leaving out the others costs in perplexity.
Shapes: T tokens, D model width, N neurons.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..converters.calibrate.fit import BATCH, fit_predictor
from ..demo_models import DEMO_MODEL
from ..layers.dense import hidden_values
from ..layers.predictor import Predictor
from ..loading import load_tokenizer
from ..storage.manifest import PredictorFacts
from ..tracing import PIECE_TOKENS as LENGTH
from .dense_neurons import WatchedFFN, load_dense
from .options import TEXT, Count, DemoModel, Share, Text
from .perplexity import cut_words, text_perplexity
from .report import Column, Report, Row, progress

COLUMNS = [
    Column("MB", "memory_bytes", 1e6, 2),
    Column("named per active", "ratio", 1, 3),
    Column("by layer", "by_layer"),
    Column("of the activation %", "mass", 0.01, 2),
    Column("named per active for 99 % of it", "mass_ratio", 1, 3),
    Column("perplexity", "perplexity", 1, 3),
    Column("fitted in s", "fit_s", 1),
]


@dataclass(frozen=True)
class Way:
    """How to fit: the rank in halves of the usual one, and whether as quantised."""

    halves: int
    bits: int
    rounded: bool

    def rank(self, usual: int) -> int:
        return usual * self.halves // 2

    def name(self, usual: int) -> str:
        when = "trained as such" if self.rounded else "afterwards"
        return f"rank {self.rank(usual)}, {self.bits} bits {when}"


WAYS = (
    Way(2, 4, rounded=False),
    Way(2, 4, rounded=True),
    Way(2, 3, rounded=True),
    Way(3, 3, rounded=True),
)


@dataclass
class Layer:
    """What one layer's FFN is given, and its predictor."""

    ffn: WatchedFFN
    fit_inputs: np.ndarray
    inputs: np.ndarray


@dataclass
class Judged:
    """One layer's outcome in cells (a neuron for a token); masses are activations."""

    active: float
    named: float
    named_for_mass: float
    mass: float
    kept: float


def run(
    text: Text,
    fit_text: Annotated[
        Path | None, TEXT, "Text to fit to.  [default: the first half of TEXT]"
    ] = None,
    model: DemoModel = DEMO_MODEL,
    fit_tokens: Annotated[Count, "Fitted to."] = 16384,
    tokens: Annotated[Count, "Judged on."] = 4096,
    steps: Annotated[Count, "Of training."] = 400,
    rank: Annotated[Count, "Of all predictors, a multiple of 128."] = 128,
    recall: Annotated[Share, "Of the active neurons, that all find."] = 0.95,
) -> Report:
    """Ways to fit predictors of neurons, judged on TEXT at equal recall.

    \b
    Example:
      mlx-flash bench predictors valid.txt --fit-text train.txt --fit-tokens 40960
    """
    net, manifest, ffns = load_dense(model)
    tokenizer = load_tokenizer(model)
    words = text.read_text()
    judged_on = words if fit_text else words[len(words) // 2 :]
    fit_on = fit_text.read_text() if fit_text else words[: len(words) // 2]
    pieces = cut_words(tokenizer, judged_on, text, tokens)
    fit_pieces = cut_words(tokenizer, fit_on, fit_text or text, fit_tokens)
    fit_inputs = watched(net, ffns, fit_pieces)
    inputs = watched(net, ffns, pieces)
    layers = [Layer(*each) for each in zip(ffns, fit_inputs, inputs, strict=True)]
    dense = text_perplexity(net, pieces)
    dtype = getattr(mx, manifest.dtype)
    rows = []
    for way in WAYS:
        name = way.name(rank)
        found, memory, started = [], 0, time.perf_counter()
        for i, layer in enumerate(progress(layers, name, "layer")):
            width = layer.inputs.shape[1]
            arrays, facts = fit_predictor(
                layer.fit_inputs,
                layer.ffn.ffn,
                dtype,
                LENGTH,
                way.rank(rank),
                recall=recall,
                steps=steps,
                seed=i,
                rounded=way.rounded,
                bits=way.bits,
            )
            predictor = stored_predictor(arrays, facts, width)
            memory += sum(a.nbytes for a in arrays.values())
            found.append(judge(layer, predictor, recall))
            layer.ffn.use(predictor)
        fit_s = time.perf_counter() - started
        perplexity = text_perplexity(net, pieces)
        rows.append(_row(name, found, memory, perplexity, fit_s))
        for layer in layers:
            layer.ffn.use(None)
    share = sum(j.active for j in found) / sum(x.inputs.shape[0] for x in layers)
    note = (
        f"Fitted to {len(fit_inputs[0]):,} tokens of "
        f"{(fit_text or text).name}, {steps} steps; judged on {pieces.size:,} tokens "
        f"of {text.name}, where {share:,.0f} neurons a layer and token are active and "
        f"{recall:.0%} of them are found. Perplexity with all neurons {dense:.3f}."
    )
    return Report("predictors", rows, COLUMNS, [note], {"dense": dense})


def watched(
    net: nn.Module, ffns: list[WatchedFFN], pieces: np.ndarray
) -> list[np.ndarray]:
    """What each FFN is given along pieces of text, [T, D]."""
    inputs = [ffn.watch() for ffn in ffns]
    for piece in progress(pieces, "reading", "piece"):
        mx.eval(net(mx.array(piece[None])))
    for ffn in ffns:
        ffn.use(None)
    return [np.concatenate(own) for own in inputs]


def stored_predictor(
    arrays: dict[str, mx.array], facts: PredictorFacts, width: int
) -> Predictor:
    """The predictor that a run would make of what was fitted."""
    predictor = Predictor(width, len(arrays["bias"]), facts.rank, facts.bits)
    predictor.load_weights(list(arrays.items()))
    return predictor


def judge(layer: Layer, predictor: Predictor, recall: float) -> Judged:
    """Move the predictor's threshold to `recall` on the layer's inputs, and count."""
    hidden, scores = [], []
    for h, score in _outcomes(layer, predictor):
        hidden.append(h)
        scores.append(score)
    h, score = np.concatenate(hidden), np.concatenate(scores)
    own = score[h > 0]
    cut = np.quantile(own, 1 - recall)
    predictor.bias = (predictor.bias.astype(mx.float32) - float(cut)).astype(mx.float32)
    order = np.argsort(-own)
    mass = np.cumsum(h[h > 0][order], dtype=np.float64)
    enough = own[order][np.searchsorted(mass, 0.99 * mass[-1])]
    return Judged(
        active=float((h > 0).sum()),
        named=float((score > cut).sum()),
        named_for_mass=float((score >= enough).sum()),
        mass=float(mass[-1]),
        kept=float(h[score > cut].sum(dtype=np.float64)),
    )


def _outcomes(
    layer: Layer, predictor: Predictor
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sizes of hidden values, and scores, batch by batch."""
    for start in range(0, len(layer.inputs), BATCH):
        x = mx.array(layer.inputs[start : start + BATCH])
        h = mx.abs(hidden_values(layer.ffn.ffn, x))
        yield np.array(h), np.array(predictor.scores(x))


def _row(
    name: str, found: list[Judged], memory: int, perplexity: float, fit_s: float
) -> Row:
    active = sum(j.active for j in found)
    row = Row(name, memory_bytes=memory)
    row.more = {
        "ratio": sum(j.named for j in found) / active,
        "by_layer": ", ".join(f"{j.named / j.active:.2f}" for j in found),
        "mass": sum(j.kept for j in found) / sum(j.mass for j in found),
        "mass_ratio": sum(j.named_for_mass for j in found) / active,
        "perplexity": perplexity,
        "fit_s": fit_s,
    }
    return row
