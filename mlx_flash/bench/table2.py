"""The paper's Table 2: what each part of the method saves of a token's I/O.

One reader and one set of files serve all rows (`methods.py`); the rows differ in what
is switched on. Nothing is multiplied. The dense rows read every byte they claim; which
neurons the sparse rows read is SYNTHETIC, with the paper's statistics
(`selections.py`).
"""

import dataclasses

from ..loading import READ_THREADS
from ..memory.policies import Window
from ..planning.cost import FlashLayer, Matrices, Work, token_cost
from ..profile import Profile, load_profile
from . import options
from .methods import Bench, Options, Player, warm_up
from .report import Column, Report, cache_state, progress

COLUMNS = [
    Column("memory GB", "memory_bytes", 1e9, 2),
    Column("GB per token", "bytes_per_token", 1e9, 3),
    Column("reads per token", "reads_per_token"),
    Column("GB/s", "gb_per_s", 1, 2),
    Column("hit rate %", "hit_rate", 0.01, 1),
    Column("I/O ms", "io_ms"),
    Column("cache ms", "cache_ms", 1, 1),
    # Only with a profile of this machine, from `mlx-flash probe`
    Column("modelled I/O ms", "modelled_io_ms"),
    Column("times less", "speedup", 1, 1),
    Column("paper GB", "paper_gb", 1, 1),
    Column("paper ms", "paper_io_ms"),
]


def run(
    model: options.Model = None,
    shape: options.OptShape = options.OPT_6_7B,
    vocab: options.OptVocab = options.OPT_VOCAB,
    dtype: options.OptDtype = "float16",
    folder: options.Folder = None,
    tokens: options.Count = 96,
    dense_tokens: options.DenseTokens = 3,
    rounds: options.Count = 3,
    window: options.Count = 4,
) -> Report:
    """The I/O of a token: naive, hybrid, predictor, windowing, bundling.

    Reads for real, through the reader that generation uses; which neurons a token
    needs is SYNTHETIC, with the paper's statistics.

    \b
    Examples:
      mlx-flash bench table2 --json table2.json
      mlx-flash bench table2 --shape 4x512x2048 --tokens 12
    """
    shares = Options(tokens, dense_tokens, rounds, window=window)
    wanted = options.parse_shape(shape, vocab, dtype)
    with options.model_or_opt(model, folder, wanted) as path:
        bench = Bench(path, shares, Window(window))
        with bench.reader:
            players = bench.players()
            warm_up(players, shares.warm_up)
            # In turns, so that a slow spell of the disk meets all rows.
            for _ in progress(range(rounds), "measuring", "round"):
                for player in players:
                    player.play(player.tokens)
            direct = bench.reader.direct
    rows = [player.row() for player in players]
    profile = load_profile()
    for player, row in zip(players, rows, strict=True):
        if profile is not None and row.bytes_per_token is not None:
            row.more["modelled_io_ms"] = 1e3 * modelled_io_s(
                profile, bench, player, row.bytes_per_token
            )
        if rows[0].io_ms and row.io_ms:
            row.more["speedup"] = rows[0].io_ms / row.io_ms
    return Report("table 2", rows, COLUMNS, notes(bench, direct), facts(bench, direct))


def modelled_io_s(
    profile: Profile, bench: Bench, player: Player, bytes_per_token: float
) -> float:
    """What the cost model makes of the bytes that a row reads per token, in seconds."""
    if not player.sparse:  # files from end to end
        return bytes_per_token / profile.sequential_bytes_per_s
    layer, count = bench.layers[0], len(bench.layers)
    work = FlashLayer(
        Matrices("matmul", "float32", 0, 0.0, 0.0),  # nothing is multiplied
        units=layer.units,
        unit_bytes=layer.unit_bytes,
        slots=1,
        # Before bundling a unit's two parts are reads of their own.
        pieces=1 if player.name.startswith("bundling") else len(layer.parts),
        selected=bytes_per_token / (count * layer.unit_bytes),
        hit_rate=0.0,
        computed=0.0,
        merged=False,
    )
    return token_cost(profile, Work((), (work,) * count, 0)).io_s


def notes(bench: Bench, direct: bool) -> list[str]:
    o, first = bench.options, bench.layers[0]
    return [
        f"Each part of the method, {len(bench.layers)} layers of {first.units:,} "
        f"neurons, {bench.manifest.model_bytes / 1e9:.2f} GB of "
        f"{bench.manifest.dtype}, bundles of {first.unit_bytes / 1024:g} KiB, "
        f"{READ_THREADS} reads in flight; {cache_state(direct)}.",
        "naive and hybrid read every byte. Which neurons the other rows read is a "
        f"SYNTHETIC trace: {o.selected:.1%} of a layer per token, of which a window of "
        f"{o.window} tokens brings {o.missing:.1%} of the layer (noise "
        f"{bench.noise:.3f}); {o.resident:.0%} of each layer has slots. Predictor and "
        "windowing read each neuron's up row and down column apart.",
        f"± is the deviation over tokens, {o.rounds} rounds of all rows in turn. "
        "Nothing is multiplied: memory is what such a run holds, without predictors. "
        "The paper's rows are OPT-6.7B on an M1 Max, its first two bytes over "
        "bandwidth.",
    ]


def facts(bench: Bench, direct: bool) -> dict:
    return {
        "trace": "synthetic",
        "cache_state": cache_state(direct),
        "native_reader": bench.reader.native,
        "model_bytes": bench.manifest.model_bytes,
        "layers": len(bench.layers),
        "units": bench.layers[0].units,
        "unit_bytes": bench.layers[0].unit_bytes,
        "noise": bench.noise,
        "options": dataclasses.asdict(bench.options),
    }
