"""The paper's Table 3: a token end to end, split into I/O, cache and compute.

A model of synthetic weights generates through the same engine three times: naive reads
every weight for every token, hybrid keeps what fits and reads the rest, all adds
predictors and the slot cache. The tokens are random, the prediction is SYNTHETIC
(`predictors.py`), everything else is what `generate` does.
"""

from collections.abc import Callable
from typing import Annotated

import mlx.core as mx
import mlx.nn as nn

from ..memory.policies import Lru
from ..storage.manifest_reading import read_manifest
from . import options
from .decode import run_model
from .landing import KeepNothing, WholeFiles
from .paper import TABLE_3
from .report import Column, Report, cache_state

# OPT-6.7B, 32 bit on the CPU of an M1 Max. No hybrid row is given for it.
PAPER = {"naive": TABLE_3[0], "all": TABLE_3[1]}
COLUMNS = [
    Column("peak GB", "memory_bytes", 1e9, 2),
    Column("GB per token", "bytes_per_token", 1e9, 3),
    Column("reads per token", "reads_per_token"),
    Column("selected %", "selected_share", 0.01, 1),
    Column("read anew %", "missing_share", 0.01, 2),
    Column("I/O ms", "io_ms"),
    Column("cache ms", "cache_ms", 1, 1),
    Column("compute ms", "compute_ms"),
    Column("total ms", "total_ms"),
    Column("times less", "speedup", 1, 1),
    Column("prompt s", "prompt_s", 1, 1),
    Column("paper I/O + memory + compute ms", "paper"),
]


def run(
    model: Annotated[
        options.Model, "Flash folder with predictors.  [default: a synthetic OPT]"
    ] = None,
    shape: options.OptShape = options.OPT_6_7B,
    vocab: options.OptVocab = options.OPT_VOCAB,
    dtype: options.OptDtype = "float32",
    folder: options.Folder = None,
    memory: options.Memory = "50%",
    prompt_tokens: options.Count = 128,
    tokens: options.Count = 256,
    dense_tokens: options.DenseTokens = 8,
) -> Report:
    """A token end to end: naive, hybrid and all of the method.

    The default writes and reads a model of 27 GB in 32 bit, because MLX computes on a
    CPU many times slower in 16.

    \b
    Examples:
      mlx-flash bench table3 --json table3.json
      mlx-flash bench table3 --shape 8x1024x4096 --tokens 64
    """
    wanted = options.parse_shape(shape, vocab, dtype)
    with options.model_or_opt(model, folder, wanted, memory) as path:
        manifest = read_manifest(path)
        size = path, memory, prompt_tokens
        rows = [
            run_model(
                "naive",
                *size,
                dense_tokens,
                predictor=False,
                policy=KeepNothing(),
                prepare=_reread_resident,
            ),
            run_model("hybrid", *size, dense_tokens, predictor=False, policy=Lru()),
            run_model("all", *size, tokens, policy=Lru()),
        ]
    for row in rows:
        if rows[0].total_ms and row.total_ms:
            row.more["speedup"] = rows[0].total_ms / row.total_ms
        if paper := PAPER.get(row.name):
            total = paper.io_ms + paper.cache_ms + paper.compute_ms
            row.more["paper"] = (
                f"{paper.io_ms:,} + {paper.cache_ms} + {paper.compute_ms} = {total:,}"
            )
    direct = all(row.more["direct_io"] for row in rows)
    layer = manifest.layers[0]
    notes = [
        f"End to end, {len(manifest.layers)} layers of {layer.units:,} neurons, "
        f"{manifest.model_bytes / 1e9:.2f} GB of {manifest.dtype}, on "
        f"{mx.default_device()}, memory {memory}; {cache_state(direct)}.",
        f"A prompt of {prompt_tokens} random tokens, then {tokens} new ones, for naive "
        f"and hybrid {dense_tokens}; ± is the deviation over tokens. Which neurons are "
        "predicted is SYNTHETIC, made to select a tenth of a layer per token and to "
        "read 2.4 % of it anew, as in the paper; beside it what came of that.",
        "naive reads every weight for each token, resident ones into a buffer beside "
        "those it computes with: its peak is not what naive needs. Peak is what MLX "
        "allocated. The paper's rows are OPT-6.7B, 32-bit compute on an M1 Max.",
    ]
    facts = {
        "prediction": "synthetic",
        "cache_state": cache_state(direct),
        "model_bytes": manifest.model_bytes,
    }
    return Report("table 3", rows, COLUMNS, notes, facts)


def _reread_resident(model: nn.Module) -> Callable[[], None]:
    """Read what is resident for every token, too: naive keeps nothing."""
    flash = model.flash
    files = WholeFiles(flash._reader, flash.stats)
    files.add(flash.folder / flash.manifest.resident.file)
    return files.read
