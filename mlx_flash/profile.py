"""What a machine can do, in the figures that the cost of a token depends on.

`mlx-flash probe` measures them once and stores them; `mlx-flash plan` reads them. Bytes
are bytes and times are seconds, GB is 1e9 wherever they are shown.
"""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import FlashError
from .storage.files import cache_folder, write_whole
from .storage.typed_json import from_json

PROFILE_VERSION = 1
SHIPPED = Path(__file__).parent / "profiles"
# From this length on a random read is taken to be as fast as reading in order.
LONG_READ_BYTES = 8 << 20
NEVER_NEGATIVE = (
    "layer_s",
    "cache_layer_s",
    "cache_slot_s",
    "copy_bytes_per_s",
    "wait_s",
    "launch_s",
)


@dataclass(frozen=True)
class FlashPoint:
    """Random reads of `block_bytes`, `threads` of them in flight at any time."""

    block_bytes: int
    threads: int
    bytes_per_s: float
    reads_per_s: float


@dataclass(frozen=True)
class BufferedPoint:
    """The same reads through the page cache: of what it does not have, and has."""

    block_bytes: int
    threads: int
    cold_bytes_per_s: float
    warm_bytes_per_s: float


@dataclass(frozen=True)
class Rate:
    """How fast MLX multiplies with weights of one kind.

    Attributes:
        kernel: "matmul" (a linear layer), "gathered" (rows picked out of slots, then an
            FFN's two products) or "experts" (`gather_mm`, `gather_qmm`).
        dtype: Of the activations.
        bits: Of packed weights, 0 for weights of `dtype`.
        bytes_per_s: Weights gone through for one token.
        flops_per_s: For many tokens at once, two for each weight and token.
    """

    kernel: str
    dtype: str
    bits: int
    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Profile:
    """One machine.

    Attributes:
        device, os: In words.
        source: Who measured it, and when or where it was published.
        cold: Whether the flash figures are surely those of the flash.
        notes: What a reader of the figures has to know.
        memory_bytes: Of the machine.
        flash: Random reads, around the page cache.
        sequential_bytes_per_s: Reading a file in order.
        memory_bytes_per_s: Copying, read and written bytes both counted.
        rates: Of multiplications.
        layer_s: What a layer costs whose weights weigh nothing, evaluation included.
        cache_layer_s, cache_slot_s: Bookkeeping of a layer and of each slot of it.
        copy_bytes_per_s: At which read units are moved to their place; 0 where they
            are read straight into it, as mlx-flash does.
        buffered: Some random reads through the page cache; none in older profiles.
        wait_s: What it costs that the host waits for MLX, beyond what is computed. 0 in
            older profiles, whose `layer_s` has a wait in it.
        launch_s: What one more tiny operation costs that nobody waits for.
    """

    profile_version: int
    device: str
    os: str
    source: str
    cold: bool
    notes: tuple[str, ...]
    memory_bytes: int
    flash: tuple[FlashPoint, ...]
    sequential_bytes_per_s: float
    memory_bytes_per_s: float
    rates: tuple[Rate, ...]
    layer_s: float
    cache_layer_s: float
    cache_slot_s: float
    copy_bytes_per_s: float
    buffered: tuple[BufferedPoint, ...] = ()
    wait_s: float = 0.0
    launch_s: float = 0.0

    def read_bytes_per_s(self, block_bytes: float, threads: float) -> float:
        """Throughput of random reads, interpolated between the measured points.

        On logarithmic scales, over the block first and then over the threads. Blocks
        shorter than the shortest measured give as many reads per second as that one,
        blocks longer than the longest approach the sequential rate.
        """
        rows = []
        for count in sorted({p.threads for p in self.flash}):
            points = sorted(
                (p.block_bytes, p.bytes_per_s) for p in self.flash if p.threads == count
            )
            first, last = points[0], points[-1]
            points.insert(0, (1, first[1] / first[0]))
            if last[0] < LONG_READ_BYTES:
                long = max(self.sequential_bytes_per_s, last[1])
                points.append((LONG_READ_BYTES, long))
            rows.append((count, _between(points, block_bytes)))
        return _between(rows, threads)

    def rate(self, kernel: str, dtype: str, bits: int) -> Rate:
        """The rate of this kind, or the nearest that was measured.

        Packed weights of a width that was not measured go by the nearest width. A kind
        that was not measured at all goes by "matmul", then by the other half precision,
        then by any rate.
        """
        dtypes = [dtype, {"float16": "bfloat16", "bfloat16": "float16"}.get(dtype)]
        named = [
            [r for r in self.rates if (r.kernel, r.dtype) == (name, kind)]
            for kind in dtypes
            for name in (kernel, "matmul")
        ]
        for rates in (*named, self.rates):
            packed = [r for r in rates if bool(r.bits) == bool(bits)]
            if packed:
                return min(packed, key=lambda r: abs(r.bits - bits))
        return next((rates[0] for rates in named if rates), self.rates[0])

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """y at x, linear on logarithmic scales; constant outside the points."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x <= x1:
            share = math.log(x / x0) / math.log(x1 / x0)
            return y0 * (y1 / y0) ** share
    return points[-1][1]


def default_path() -> Path:
    """Where this user's profile is: `MLX_FLASH_PROFILE`, or the cache folder."""
    named = os.environ.get("MLX_FLASH_PROFILE")
    return Path(named).expanduser() if named else cache_folder() / "profile.json"


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile, whole or not at all.

    Raises:
        FlashError: If the folder cannot be made or written.
    """
    try:
        write_whole(path, profile.to_json())
    except OSError as error:
        raise FlashError(
            f"The profile cannot be written to {path}: {error.strerror or error}. Name "
            "another file in MLX_FLASH_PROFILE."
        ) from error


def load_profile(name: str | Path | None = None) -> Profile | None:
    """A profile by its file or by the name of a shipped one ("m1-max-paper").

    Args:
        name: None for this machine's own.

    Returns:
        The profile; None if this machine's own was asked for and there is none yet.

    Raises:
        FlashError: If the file is missing, damaged, or of another version.
    """
    if name is None:
        if not os.environ.get("MLX_FLASH_PROFILE") and not default_path().exists():
            return None
        path = default_path()
    else:
        shipped = SHIPPED / f"{name}.json"
        path = shipped if shipped.is_file() else Path(name).expanduser()
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.json")))
        raise FlashError(
            f"There is no profile {path}. Make one with mlx-flash probe, or name a "
            f"shipped one: {names}."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise FlashError(f"{path} cannot be read as a profile: {error}.") from error
    version = raw.get("profile_version") if isinstance(raw, dict) else None
    if version != PROFILE_VERSION:
        raise FlashError(
            f"{path} is no profile of version {PROFILE_VERSION} (found {version!r}). "
            "Measure again: mlx-flash probe"
        )
    profile = from_json(Profile, raw, path, "profile")
    _check(profile, path)
    return profile


def measured_here(mlx_device: str) -> Profile | None:
    """This machine's own profile, for running a model with its figures.

    Args:
        mlx_device: "cpu" or "gpu", which MLX computes on.

    Returns:
        None if there is none, if it is of the other device, or cannot be read: models
        run without one, and `mlx-flash plan` says what is wrong with it.
    """
    try:
        profile = load_profile()
    except FlashError:
        return None
    if profile is None or not profile.device.endswith(f"MLX on {mlx_device}"):
        return None
    return profile


def _check(profile: Profile, path: Path) -> None:
    """Every rate is divided by: it must be a positive number."""
    rates = {
        "flash": [n for p in profile.flash for n in dataclasses.astuple(p)],
        "buffered": [n for p in profile.buffered for n in dataclasses.astuple(p)],
        "rates": [n for r in profile.rates for n in (r.bytes_per_s, r.flops_per_s)],
        "sequential_bytes_per_s": [profile.sequential_bytes_per_s],
        "memory_bytes_per_s": [profile.memory_bytes_per_s],
    }
    for name, values in rates.items():
        missing = not values and name != "buffered"
        if missing or not all(0 < n < math.inf for n in values):
            raise FlashError(
                f"{path}: {name} must hold numbers above zero. Measure again: "
                "mlx-flash probe"
            )
    for name in NEVER_NEGATIVE:
        if not 0 <= getattr(profile, name) < math.inf:
            raise FlashError(f"{path}: {name} must not be negative.")
