"""Compare one family from flash with the same model in memory.

A tiny checkpoint with random weights is loaded twice: by mlx-lm as a whole, and by
mlx-flash with slots for a quarter of a layer's experts, neurons or blocks: in place,
and converted. All read the same prompt and further tokens. Experts must give the same
bits; neurons and blocks are added up in another order, and agree to 1e-4 of the largest
logit.
"""

import contextlib
import io
import json
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as load_resident
from mlx_lm.utils import quantize_model

from ... import loading, sizing
from ...arrays import parameters
from ...converters.convert import convert
from ...errors import FlashError
from ...flash import Loaded
from ...layers import block, lookup
from ...layers.kinds import EXPERT
from ...memory import beside
from ...memory.budget import Budget, make_budget
from ...models.registry import get_model_classes
from ..synthetic import make_model
from .configs import DENSE, make_config

PROMPT, DECODED = 70, 3  # mlx-lm sorts from 64 pairs on
DENSE_PROMPT = 40
ROWS = 8  # slots of a table of embeddings
BLOCK_BYTES = 2_000  # so that these small FFNs are more than one block
TOKENS = 60  # ids that every one of these vocabularies has
SUM_TOLERANCE = 1e-4  # of the largest logit, for sums in another order
MOST_VALUES = 20_000_000  # a config that forgets a size gets a model of billions


@dataclass
class Verdict:
    """One line of the table. `places` are "in place" and "converted".

    `tables` counts those of embeddings that came from flash.
    """

    family: str
    verdict: str = ""
    unit: str = ""
    layers: str = ""
    places: str = ""
    difference: float | None = None
    tables: int = 0

    def line(self) -> str:
        cells = self.family, self.unit, self.layers, self.verdict
        return f"| {' | '.join(cells)} |"


def check(
    family: str,
    checkpoint: Path | None,
    work: Path,
    bits: int | None,
    blocks: bool = False,
) -> Verdict:
    """The family's `Verdict`.

    Tables of embeddings go to flash however small they are.

    Args:
        checkpoint: None where one has to be made.
        blocks: Put dense FFNs beside experts on flash, too; then only converted.
    """
    with (
        mock.patch.object(lookup, "LEAST_TABLE_BYTES", 1),
        mock.patch.object(beside, "TABLE_SLOTS", ROWS),
    ):
        return _check(family, checkpoint, work, bits, blocks)


def _check(
    family: str, checkpoint: Path | None, work: Path, bits: int | None, blocks: bool
) -> Verdict:
    dense = checkpoint is not None or family in DENSE
    block.BLOCK_BYTES = BLOCK_BYTES
    try:
        if checkpoint is None:
            config = make_config(family)
            checkpoint = write_checkpoint(work / "checkpoint", config, bits)
        resident, _ = load_resident(checkpoint, get_model_classes=get_model_classes)
        expected = run(resident, DENSE_PROMPT if dense else PROMPT)
    except (Exception, SystemExit) as error:  # a row; the others are still checked
        return Verdict(family, f"mlx-lm cannot run it here: {reason(error)}")
    try:
        results: dict[str, Verdict] = {}
        if not (dense or blocks):
            with contextlib.suppress(FlashError):  # then only converted
                results["in place"] = compare(checkpoint, expected)
        flash = convert(
            checkpoint, work / "flash", rank=0, blocks=blocks, progress=False
        )
        results["converted"] = compare(flash, expected)
    except FlashError as error:
        return Verdict(family, f"refused: {reason(error)}")
    except Exception as error:
        return Verdict(family, f"FAILED: {reason(error)}")
    worst = max(found.difference or 0.0 for found in results.values())
    scale = max(float(np.abs(e).max()) for e in expected)
    last = results["converted"]
    same_bits = last.unit == EXPERT.name and not blocks
    allowed = 0.0 if same_bits else SUM_TOLERANCE * scale
    return replace(
        last,
        family=family,
        verdict=f"{worst:.2g}" + ("" if worst <= allowed else " DIFFERS"),
        places=", ".join(results),
        difference=worst,
    )


def write_checkpoint(folder: Path, config: dict, bits: int | None) -> Path:
    """A checkpoint as mlx-lm would save it, with random weights that all matter."""
    model = make_model(config)
    values = sum(array.size for array in parameters(model).values())
    if values > MOST_VALUES:
        raise ValueError(f"{values:,} values: its config here lacks a size")
    mx.random.seed(0)

    def draw(array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        around = 1.0 if array.ndim == 1 else 0.0  # norms
        return (around + 0.15 * mx.random.normal(array.shape)).astype(array.dtype)

    model.apply(draw)
    if bits:
        rule = getattr(model, "quant_predicate", None)  # routers, say, stay at 8 bits
        with contextlib.redirect_stdout(io.StringIO()):
            model, config = quantize_model(
                model, config, 32, bits, quant_predicate=rule
            )
    folder.mkdir()
    file = str(folder / "model.safetensors")
    mx.save_safetensors(file, parameters(model), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(model: nn.Module, prompt: int) -> list[np.ndarray]:
    """Logits of a prompt, and of further tokens one by one."""
    tokens = np.random.default_rng(0).integers(0, TOKENS, (1, prompt + DECODED))
    cache = make_prompt_cache(model)
    steps = mx.split(mx.array(tokens), list(range(prompt, prompt + DECODED)), axis=1)
    logits = [model(step, cache=cache).astype(mx.float32) for step in steps]
    return [np.array(mx.maximum(x, -1e9)) for x in logits]  # -inf rules a token out


def compare(folder: Path, expected: list[np.ndarray]) -> Verdict:
    """Stream the model in `folder`: what came from flash, and how far it differs."""
    with load_few_slots(folder) as (model, _):
        flash = model.flash
        actual = run(model, expected[0].shape[1])
    unread = flash.manifest.tables and not flash.stats.rows_read
    if (
        flash.stats.misses == 0
        or unread
        or any(
            slots == layer.units
            for slots, layer in zip(
                flash.budget.slots, flash.manifest.layers, strict=True
            )
        )
    ):
        raise RuntimeError("a layer was not streamed: this compares nothing")
    if not all(np.isfinite(e).all() and np.ptp(e) > 0 for e in expected):
        raise RuntimeError("the resident model's logits are NaN or all alike")
    diff = max(np.abs(a - e).max() for a, e in zip(actual, expected, strict=True))
    layers = f"{len(flash.layers)} of {len(flash.manifest.layers)}"
    unit, tables = flash.manifest.unit, len(flash.manifest.tables)
    return Verdict("", "", unit, layers, "", float(diff), tables)


def load_few_slots(folder: Path) -> Loaded:
    """The model with slots for a quarter of each layer's units, and room for the rest.

    With less memory a prompt would come in chunks. Then models with recurrent layers
    round otherwise, in memory as well, and mlx-lm's plamo3 loses a token of its window.
    """

    def of_a_quarter(*args) -> Budget:
        budget, footprint = make_budget(*args), args[1]
        manifest = footprint.manifest
        slots = tuple(max(layer.units // 4, 1) for layer in manifest.layers)
        few = beside.least_beside(manifest)
        return replace(budget, slots=slots, beside_slots=few)

    with mock.patch.object(sizing, "make_budget", of_a_quarter):
        return loading.load_model(
            folder, "1GB", predictor=False, context=128, page_cache=True
        )


def reason(error: BaseException) -> str:
    text = re.sub(tempfile.gettempdir() + r"\S*/", "", f"{error}")
    if not isinstance(error, FlashError):
        text = f"{type(error).__name__} {text}"
    return " ".join(text.split())[:140]
