"""Rows of the paper's tables 2 and 3, put to the cost model.

LLM in a flash (arXiv 2312.11514): OPT 6.7B and Falcon 7B on an M1 Max. What the paper
counted (shares of neurons predicted, loaded and held) goes in; milliseconds come out,
beside those that the paper measured.
"""

from dataclasses import dataclass

from ..planning.cost import Cost, FlashLayer, Matrices, Work, token_cost
from ..profile import load_profile
from . import report

HALF = 2  # bytes of a value on flash


@dataclass(frozen=True)
class Model:
    """Sizes, and the shares of the FFN that the paper counted.

    `held` is in memory, `predicted` is read for a token where nothing is kept,
    `loaded` where a window is; `predictor` is a share of the whole model.
    """

    name: str
    dims: int
    neurons: int
    layers: int
    other_values: int
    held: float
    predicted: float
    loaded: float
    predictor: float

    @property
    def ffn_values(self) -> int:
        return 2 * self.dims * self.neurons * self.layers

    @property
    def values(self) -> int:
        return self.ffn_values + self.other_values


# Values outside the FFNs: embeddings, positions and four matrices of attention for OPT;
# embeddings and attention with one key and value head for Falcon.
OPT = Model(
    "OPT 6.7B",
    dims=4096,
    neurons=16384,
    layers=32,
    other_values=(50272 + 2050) * 4096 + 32 * 4 * 4096**2,
    held=0.24,
    predicted=0.10,
    loaded=0.024,
    predictor=0.024,
)
FALCON = Model(
    "Falcon 7B",
    dims=4544,
    neurons=18176,
    layers=32,
    other_values=65024 * 4544 + 32 * (2 * 4544**2 + 2 * 64 * 4544),
    held=0.33,
    predicted=0.10,
    loaded=0.031,
    predictor=0.04,
)


@dataclass(frozen=True)
class Row:
    """One line of a table: what the paper measured, 0 where it gives none.

    `gb` is read from flash for a token. The first two of table 2 are bytes divided by
    bandwidth, not measured.
    """

    model: Model
    method: str
    dtype: str
    io_ms: float
    cache_ms: float = 0.0
    compute_ms: float = 0.0
    gb: float = 0.0


TABLE_2 = (
    Row(OPT, "naive", "float16", 2196, gb=13.4),
    Row(OPT, "hybrid", "float16", 1090, gb=6.7),
    Row(OPT, "+ predictor", "float16", 738, gb=0.9),
    Row(OPT, "+ window", "float16", 164, gb=0.2),
    Row(OPT, "+ bundles", "float16", 87, gb=0.2),
)
TABLE_3 = (
    Row(OPT, "naive", "float32", 2196, 0, 986),
    Row(OPT, "+ bundles", "float32", 105, 58, 506),
    Row(OPT, "naive", "float16", 2196, 0, 193),
    Row(OPT, "+ bundles", "float16", 92, 35, 438),
    Row(FALCON, "naive", "float32", 2295, 0, 800),
    Row(FALCON, "hybrid", "float32", 1147, 0, 800),
    Row(FALCON, "+ bundles", "float32", 161, 92, 453),
)


def run() -> report.Report:
    """The paper's tables beside what the cost model makes of them.

    Nothing is measured: sizes and the shares of neurons that the paper counted go into
    the model of `mlx-flash plan`.
    """
    rows = []
    for row in TABLE_2 + TABLE_3:
        cost = model_row(row)
        more = {"model": row.model.name, "method": row.method, "dtype": row.dtype}
        more["io"] = _beside(cost.io_s, row.io_ms)
        if row in TABLE_3:
            more["cache"] = _beside(cost.cache_s, row.cache_ms)
            compute_s = cost.compute_s + cost.wait_s
            more["compute, waits"] = _beside(compute_s, row.compute_ms)
        rows.append(report.Row("3" if row in TABLE_3 else "2", more=more))
    columns = [report.Column("I/O" if key == "io" else key, key) for key in more]
    note = "Modelled / paper, in ms per token on an M1 Max."
    return report.Report("table", rows, columns, [note], {})


def _beside(modelled_s: float, paper_ms: float) -> str:
    if not paper_ms:
        return f"{1e3 * modelled_s:,.0f} / –"
    ratio = 1e3 * modelled_s / paper_ms - 1
    return f"{1e3 * modelled_s:,.0f} / {paper_ms:,.0f} ({ratio:+.0%})"


def model_row(row: Row) -> Cost:
    """The modelled cost of a row on the paper's M1 Max."""
    profile = load_profile("m1-max-paper")
    assert profile is not None  # it is shipped
    cost = token_cost(profile, work_of(row.model, row.method, row.dtype))
    if row.method != "naive":
        return cost
    # Nothing is kept: embeddings and attention are read for every token, too.
    nbytes = row.model.other_values * HALF
    return cost + Cost(io_s=nbytes / profile.sequential_bytes_per_s, bytes_read=nbytes)


def work_of(model: Model, method: str, dtype: str) -> Work:
    """What a method asks of the machine for each token."""
    size = 4 if dtype == "float32" else HALF
    resident: float = model.other_values
    dense = method in ("naive", "hybrid")
    selected, computed = model.loaded, model.held
    if dense:
        # All is needed in order; half of the model fits, or nothing.
        fits = model.values / 2 - model.other_values if method == "hybrid" else 0.0
        selected, computed = 1 - fits / model.ffn_values, 1.0
    else:
        resident += model.predictor * model.values
    if method == "+ predictor":
        selected = model.predicted
    units = model.neurons
    values = 2 * model.dims * units
    layer = FlashLayer(
        weights=Matrices("matmul", dtype, 0, size * values, values),
        units=units,
        unit_bytes=2 * model.dims * HALF,
        slots=int(model.held * units),
        pieces=2 if method in ("+ predictor", "+ window") else 1,
        selected=selected * units,
        hit_rate=0.0,
        computed=computed * units,
        random=not dense,
        merged=False,
        # The float32 rows ran on the CPU, where the host is what computes.
        waits=1 if not dense and dtype == "float16" else 0,
    )
    outer = Matrices("matmul", dtype, 0, size * resident, resident)
    return Work((outer,), (layer,) * model.layers, model.layers)
