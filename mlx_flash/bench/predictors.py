"""Predictors for random weights, whose choices cost what a trained model's do.

A neuron's score is what its random low-rank matrices make of the token, plus a fixed
popularity, less a threshold. The more popularity counts, the more do tokens choose the
same neurons. Both are set per layer by letting a prompt through the model: a tenth of
the layer is chosen, and slots of the budget miss 2.4 % of it per token, as in the
paper. The choices are SYNTHETIC: they mean nothing for the model's output.
"""

import dataclasses
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..arrays import parameters
from ..converters.resident import write_weights
from ..layers.predictor import Predictor, possible_bits
from ..loading import load_model
from ..memory.policies import Lru
from ..memory_size import parse_memory
from ..storage.manifest import MANIFEST, PREDICTORS, Manifest, PredictorFacts
from ..storage.manifest_reading import read_manifest
from .decode import random_prompt
from .report import progress
from .selections import bisect, miss_share

SELECTED = 0.10  # of a layer, chosen for a token
MISSING = 0.024  # of a layer, read for a token
# The longer the context, the less do tokens differ after attention has averaged over
# it: only the second half of the prompt counts, where generation goes on from.
TOKENS = 256
WARM_TOKENS = 128


class Recorder(nn.Module):
    """Stands in for a predictor: keeps its input, chooses everything."""

    def __init__(self, predictor: Predictor):
        super().__init__()
        self.predictor = predictor
        self.inputs: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        self.inputs.append(x)
        return mx.ones((len(x), self.predictor.bias.size), mx.bool_)


def rank_of(layer: int, layers: int, dims: int) -> int:
    """The paper's ranks for OPT-6.7B, 128 and 1,024 in the last eighth, to scale."""
    return max(dims // (4 if layer >= layers - layers // 8 else 32), 1)


def add_predictors(folder: Path, memory: str) -> None:
    """Give a flash folder without predictors such that cost what the paper's do, with
    the slots of `memory`."""
    manifest = read_manifest(folder)
    dims = manifest.layers[0].parts[0].shape[0]
    made = _random(manifest, dims)
    scores, slots = _scores(folder, memory, made)
    shares = []
    layers = list(zip(made, manifest.layers, scores, slots, strict=True))
    for predictor, layer, score, n in progress(layers, "calibrating", "layer"):
        predictor.bias, share = _bias(score, layer.units, n)
        shares.append(share)
    _write(folder, manifest, made, shares)


def _random(manifest: Manifest, dims: int) -> list[Predictor]:
    mx.random.seed(0)
    found = []
    for i, layer in enumerate(manifest.layers):
        rank = rank_of(i, len(manifest.layers), dims)
        predictor = Predictor(dims, layer.units, rank)
        predictor.set_dtype(getattr(mx, manifest.dtype))
        if bits := possible_bits(dims, rank):
            predictor.quantize(bits)
        mx.eval(predictor.parameters())
        found.append(predictor)
    return found


def _scores(
    folder: Path, memory: str, predictors: list[Predictor]
) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """Scores [tokens, units] of each layer for a random prompt, and its slots."""
    budget = parse_memory(memory)
    if isinstance(budget, float):
        budget = int(budget * read_manifest(folder).model_bytes)
    if budget is not None:  # the folder does not have the predictors yet
        budget -= sum(a.nbytes for p in predictors for a in parameters(p).values())
    loaded = load_model(folder, budget or "auto", predictor=False, context=TOKENS)
    with loaded as (model, config):
        recorders = [Recorder(predictor) for predictor in predictors]
        for layer, recorder in zip(model.flash.layers, recorders, strict=True):
            layer.predictor = recorder
            layer.batch_tokens = TOKENS  # it is asked about one batch alone
        mx.eval(model(random_prompt(TOKENS, config["vocab_size"])[None]))
        scores = [
            np.array(r.predictor.scores(mx.concatenate(r.inputs)).astype(mx.float32))
            for r in recorders
        ]
        return scores, model.flash.budget.slots


def _bias(scores: np.ndarray, units: int, n_slots: int) -> tuple[mx.array, float]:
    """Popularity less threshold, found by bisection on what an LRU would miss."""
    popularity = np.random.default_rng(n_slots).standard_normal(units, np.float32)
    popularity *= scores.std()

    def at(weight: float) -> tuple[np.ndarray, np.ndarray]:
        total = scores + weight * popularity
        threshold = np.quantile(total, 1 - SELECTED)
        return total > threshold, weight * popularity - threshold

    def steady(weight: float) -> bool:
        asked = [np.flatnonzero(row) for row in at(weight)[0]]
        return miss_share(asked, units, n_slots, Lru(), WARM_TOKENS) <= MISSING

    chosen, bias = at(bisect(steady, 16.0, range(10)))
    return mx.array(bias), float(chosen.mean())


def _write(
    folder: Path, manifest: Manifest, predictors: list[Predictor], shares: list[float]
) -> None:
    arrays: dict[str, mx.array] = {}
    layers = []
    for i, (layer, made) in enumerate(zip(manifest.layers, predictors, strict=True)):
        for name, array in parameters(made).items():
            arrays[f"{layer.module}.predictor.{name}"] = array
        facts = PredictorFacts(
            rank=made.reduce.weight.shape[0],
            bits=getattr(made.reduce, "bits", 0),
            threshold=0.5,
            # Nothing was fitted, so there is nothing that could have been found.
            recall=0.0,
            precision=0.0,
            mass=0.0,
            predicted_share=shares[i],
            active_share=0.0,
        )
        layers.append(dataclasses.replace(layer, predictor=facts))
    target = folder / PREDICTORS
    manifest = dataclasses.replace(
        manifest, predictors=write_weights(target, arrays), layers=tuple(layers)
    )
    part = folder / f"{MANIFEST}.part"
    part.write_text(manifest.to_json())
    part.replace(folder / MANIFEST)  # last: predictors are there, or none are
