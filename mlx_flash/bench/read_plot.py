"""Draw a profile. matplotlib is wanted here alone, and only when asked for."""

from __future__ import annotations

from pathlib import Path

from ..errors import FlashError
from ..planning.profile import Profile


def check_plot(path: Path) -> None:
    """Judge before measuring whether `plot_reads` can work.

    Raises:
        FlashError: If matplotlib is missing, or the file cannot be of that name.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise FlashError(
            "--plot needs matplotlib, which is not installed: pip install matplotlib"
        ) from None
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise FlashError(f"{path} is no name of a picture. Try {path.stem}.png.")
    if not path.absolute().parent.is_dir():
        raise FlashError(f"There is no folder {path.parent} for {path.name}. Make it.")


def plot_reads(profile: Profile, path: Path) -> None:
    """Throughput over the length of a read, a line for each number in flight."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for threads in sorted({p.threads for p in profile.flash}):
        points = sorted(
            (p.block_bytes, p.bytes_per_s / 1e9)
            for p in profile.flash
            if p.threads == threads
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{threads} at once")
    speed = profile.sequential_bytes_per_s / 1e9
    axes.axhline(speed, color="grey", linestyle="--", label="in order")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes of a read")
    axes.set_ylabel("GB/s (GB is 1e9)")
    axes.set_title(f"{profile.device}\n{profile.source}", fontsize=9)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise FlashError(f"{path} could not be written: {error.strerror}.") from error
