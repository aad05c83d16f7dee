"""What a benchmark found: rows, and all that is needed to judge and repeat them.

Times are milliseconds per token, sizes bytes, GB 1e9. A cell nobody measured is None,
and a dash in the table.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from .._version import __version__
from ..memory.stats import Stats
from ..planning.machine import machine
from ..progress import bars
from ..tables import Table

T = TypeVar("T")
TIMES = ("io_ms", "cache_ms", "compute_ms", "total_ms")


@dataclass(frozen=True)
class Sample:
    """What counters rose by in one token; `total_s` is None where nothing was
    multiplied."""

    spent: Stats
    total_s: float | None = None

    @property
    def io_ms(self) -> float:
        return 1e3 * self.spent.io_s

    @property
    def cache_ms(self) -> float:
        return 1e3 * self.spent.cache_s

    @property
    def compute_ms(self) -> float | None:
        if self.total_s is None:
            return None
        return 1e3 * (self.total_s - self.spent.io_s - self.spent.cache_s)

    @property
    def total_ms(self) -> float:
        return self.io_ms + self.cache_ms + (self.compute_ms or 0.0)


@dataclass
class Row:
    """Means over `tokens`, deviations beside them in `std`.

    `more` has what follows from the counters, see `count`, and the bench's own figures;
    of a row that could not be measured, the reason as "error".
    """

    name: str
    io_ms: float | None = None
    cache_ms: float | None = None
    compute_ms: float | None = None
    total_ms: float | None = None
    bytes_per_token: float | None = None
    reads_per_token: float | None = None
    memory_bytes: int | None = None
    tokens: int = 0
    std: dict[str, float] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(cls, name: str, samples: list[Sample], memory_bytes: int, **more) -> Row:
        """The means of `samples`, with their sample deviations where there are two.

        Args:
            more: Further figures; with "units", those of the model, come the shares of
                them that a token selects and misses.
        """
        row = cls(name, memory_bytes=memory_bytes, tokens=len(samples), more=more)
        row.samples = samples
        for time in TIMES:
            values = [getattr(sample, time) for sample in samples]
            if values and None not in values:
                setattr(row, time, mean(values))
                row.std[time] = stdev(values) if len(values) > 1 else 0.0
                more[f"median_{time}"] = median(values)
        if samples:
            row.count(sum((sample.spent for sample in samples), Stats()))
        if row.compute_ms is not None:
            more["tokens_per_s"] = 1e3 / mean(sample.total_ms for sample in samples)
        return row

    def count(self, spent: Stats) -> None:
        """Note what all tokens together have read."""
        self.bytes_per_token = spent.bytes_read / self.tokens
        self.reads_per_token = spent.reads / self.tokens
        self.more |= {
            "hit_rate": spent.hit_rate,
            "gb_per_s": spent.read_gb_per_s,
            "bytes_per_read": spent.bytes_read / max(spent.reads, 1),
            "units_per_read": spent.misses / max(spent.reads, 1),
            "reads_per_s": spent.reads / spent.read_s if spent.read_s else None,
            "hidden_share": spent.read_hidden_share,
            "early_precision": spent.early_precision,
            "early_share": spent.early_share,
        }
        if units := self.more.get("units"):
            self.more["selected_share"] = spent.asked / units / self.tokens
            self.more["missing_share"] = spent.misses / units / self.tokens

    @classmethod
    def failed(cls, name: str, error: object) -> Row:
        """A row that could not be measured, and why."""
        return cls(name, more={"error": str(error)})

    def to_json(self) -> dict:
        facts = {k: v for k, v in vars(self).items() if k not in ("more", "samples")}
        return facts | self.more

    @classmethod
    def from_json(cls, facts: dict) -> Row:
        """The row that `to_json` wrote, in another process for example."""
        own = {f.name for f in fields(cls)} & facts.keys()
        row = cls(**{name: facts[name] for name in own})
        row.more = {k: v for k, v in facts.items() if k not in own}
        return row

    def get(self, key: str) -> Any:
        return self.to_json().get(key)

    def note_spread(self, key: str, values: Sequence[float]) -> None:
        """Keep a mean under `key`, with its deviation where there are two values."""
        self.more[key] = mean(values)
        if len(values) > 1:
            self.std[key] = stdev(values)


@dataclass(frozen=True)
class Column:
    """A column of the table: a row's value under `key`, divided by `scale`.

    A column for which no row has a value is left out.
    """

    heading: str
    key: str
    scale: float = 1.0
    digits: int = 0

    def cell(self, row: Row) -> str:
        value = row.get(self.key)
        if value is None:
            return "–"
        if isinstance(value, bool):
            return "yes" if value else "NO"
        if isinstance(value, str):
            return value
        text = f"{value / self.scale:,.{self.digits}f}"
        std = row.std.get(self.key)
        if std is None or row.tokens < 2:
            return text
        return f"{text} ± {std / self.scale:,.{self.digits}f}"


@dataclass
class Report:
    """A benchmark's result; `notes` are the sentences that must go with its table."""

    benchmark: str
    rows: list[Row]
    columns: list[Column]
    notes: list[str]
    facts: dict = field(default_factory=dict)

    def table(self) -> Table:
        """The rows, in the columns for which any has a value."""
        shown = [
            c for c in self.columns if any(r.get(c.key) is not None for r in self.rows)
        ]
        headings = [self.benchmark, *(column.heading for column in shown)]
        rows = [[row.name, *(c.cell(row) for c in shown)] for row in self.rows]
        return Table(headings, rows)

    def errors(self) -> list[str]:
        """Why rows could not be measured."""
        found = [(row.name, row.more.get("error")) for row in self.rows]
        return [f"{name}: {error}" for name, error in found if error]

    def markdown(self) -> str:
        """The table, with the notes above it."""
        errors = self.errors()
        lines = [*self.notes, "", self.table().markdown()]
        return "\n".join([*lines, *([""] + errors if errors else [])])

    def to_json(self) -> dict:
        return {
            "benchmark": self.benchmark,
            "command": shlex.join(["mlx-flash", *sys.argv[1:]]),
            "machine": environment(),
            "notes": self.notes,
            **self.facts,
            "rows": [row.to_json() for row in self.rows],
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=1, default=str) + "\n")


def cache_state(direct: bool) -> str:
    """What can be said about caches below the reads."""
    if direct:
        return (
            "cold: direct I/O past the page cache (a cache of the disk itself, or of a "
            "virtual machine's host, could not be purged)"
        )
    return "WARM: reads went through the operating system's page cache"


def environment() -> dict:
    """The machine, its load, and the versions of what does the work."""
    device, system = machine()
    return {
        "device": device,
        "os": system,
        "load_average": os.getloadavg(),
        "mlx_device": str(mx.default_device()),
        "versions": {
            "mlx_flash": __version__,
            "mlx": version("mlx"),
            "mlx_lm": version("mlx-lm"),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "LD_PRELOAD": os.environ.get("LD_PRELOAD"),
    }


def progress(items: Iterable[T], what: str, unit: str = "it") -> Iterable[T]:
    """A bar on stderr, where a person looks at it."""
    return bars(items, what, None, unit=unit)
