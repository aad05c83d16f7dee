"""Which engines are compared, which Python has each, and one run of one of them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

from ...errors import FlashError
from ...storage.direct_io import drop_cached
from ..process import run_command
from .guest.script import Job

HERE = Path(__file__).parent  # where Python finds `guest`
PACKAGE = HERE.parents[2]  # and mlx_flash
CLOSE = 0.03  # to the budget is close enough
FIND = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"


@dataclass(frozen=True)
class Engine:
    """A row: an engine of `guest.py`, and what it is told.

    Attributes:
        package: Its name for pip.
        fitted: Its memory option says something else than what it holds at its peak,
            so the option is searched for.
        resident: It holds the whole model, whatever the budget.
        page_cache: Ours alone: through the system's page cache, or around it.
    """

    name: str
    kind: str
    package: str
    fitted: bool = True
    resident: bool = False
    page_cache: str = "off"


OURS = Engine("mlx-flash, direct I/O", "mlx_flash", "mlx", fitted=False)
CACHED = Engine(
    "mlx-flash, page cache", "mlx_flash", "mlx", fitted=False, page_cache="on"
)
RESIDENT = Engine("mlx-lm, resident", "mlx_lm", "mlx-lm", fitted=False, resident=True)
MOE = (
    OURS,
    CACHED,
    RESIDENT,
    Engine("mlx-vlm, expert offload", "mlx_vlm", "mlx-vlm"),
    Engine("boyle", "boyle", "boyle"),
    Engine("BigRig", "bigrig", "bigrig"),
)
DENSE = (OURS, CACHED, RESIDENT, Engine("neurostream", "neurostream", "neurostream"))


@cache
def version_in(python: str, package: str) -> str | None:
    """A package's version in a Python, None where it is not installed.

    Raises:
        FlashError: If this is no Python.
    """
    try:
        found = subprocess.run(
            [python, "-c", FIND, package], capture_output=True, text=True
        )
    except OSError as error:
        raise FlashError(
            f"{python} cannot be run: {error.strerror}. Name the python of a virtual "
            "environment, as --python env/bin/python."
        ) from None
    return found.stdout.strip() or None


def python_of(engine: Engine, pythons: Sequence[str]) -> str:
    """The first Python that has the engine: ours, then those that were named.

    Raises:
        FlashError: If none has, saying how to install it.
    """
    for python in (sys.executable, *pythons):
        if version_in(python, engine.package):
            return python
    raise FlashError(
        f"{engine.package} is not installed. In an environment of its own: python -m "
        f"venv peers && peers/bin/pip install 'mlx[cpu]' {engine.package} psutil, then "
        "--python peers/bin/python."
    )


@dataclass
class Measured:
    """One run of an engine. Bytes, seconds and CPU seconds; decoding per token.

    `disk` is what the system had read from the disk for the process, `asked` what the
    engine asked for, cached by the system or not.
    """

    prompt_s: float
    prompt_cpu_s: float
    prompt_disk: float | None
    prompt_asked: float | None
    tokens_per_s: float
    token_cpu_s: float
    token_disk: float | None
    token_asked: float | None
    peak_bytes: int | None
    growth_bytes: int | None
    best: list[int]
    facts: dict

    @classmethod
    def of(cls, found: dict, warm_up: int) -> "Measured":
        start, first, *later = found.pop("marks")
        since, end = [first, *later][warm_up], later[-1]
        count = len(later) - warm_up

        def spent(key: str, begin: dict, stop: dict, share: int = 1) -> float | None:
            return (stop[key] - begin[key]) / share if key in begin else None

        return cls(
            prompt_s=first["s"] - start["s"],
            prompt_cpu_s=first["cpu_s"] - start["cpu_s"],
            prompt_disk=spent("disk", start, first),
            prompt_asked=spent("asked", start, first),
            tokens_per_s=count / (end["s"] - since["s"]),
            token_cpu_s=(end["cpu_s"] - since["cpu_s"]) / count,
            token_disk=spent("disk", since, end, count),
            token_asked=spent("asked", since, end, count),
            peak_bytes=found.pop("peak_bytes", None),
            growth_bytes=found.pop("growth_bytes", None),
            best=found.pop("best"),
            facts=found,
        )


def middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def measure(engine: Engine, python: str, job: Job) -> Measured:
    """Run an engine once, in a process of its own, on files that are not cached.

    Raises:
        FlashError: As the process ended.
    """
    for folder in job["path"], job["scratch"]:
        drop_folder(Path(folder))
    job = job | {"engine": engine.kind, "page_cache": engine.page_cache}
    places = [HERE, PACKAGE] if engine.kind == "mlx_flash" else [HERE]
    found = run_command(
        [python, "-m", "guest", json.dumps(job)],
        environment={"PYTHONPATH": os.pathsep.join(map(str, places))},
    )
    return Measured.of(found, job["warm_up"])


def drop_folder(folder: Path) -> None:
    """Drop the pages of all files in a folder, where the system takes that advice."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())  # pages not yet written would stay
            drop_cached(file)


def fit(engine: Engine, python: str, job: Job, trials: int = 4) -> int:
    """The memory option, of those tried, whose peak comes nearest to the budget.

    Args:
        job: With "memory", the budget.
        trials: Runs at most; whole ones, as caches fill while they decode.

    Raises:
        FlashError: If the engine runs with none of them.
    """
    target = job["memory"]
    option = target // 2
    tried: list[tuple[int, int]] = []  # how far from the budget, and the option
    for last in [False] * (trials - 1) + [True]:
        try:
            found = measure(engine, python, job | {"memory": option})
        except FlashError:  # some refuse what is too little for them
            if last and not tried:
                raise
            option = (option + target) // 2
            continue
        peak = found.peak_bytes or found.growth_bytes or target
        tried.append((abs(peak - target), option))
        if abs(peak - target) <= CLOSE * target:
            break
        option = max(option + target - peak, target // 20)
    return min(tried)[1]
