"""`mlx-flash probe`: measure this machine, and keep the figures for `plan`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click


@click.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw the throughput over the length of reads (needs matplotlib).",
)
@click.option("--quiet", "-q", is_flag=True, help="Say nothing of the progress.")
def probe(folder, as_json, plot, quiet):
    """Measure the flash under FOLDER, memory and MLX in less than 30 seconds.

    FOLDER is a model's, read and never written; without it a temporary file is written,
    read and deleted. The figures are kept in ~/.cache/mlx-flash/profile.json (or where
    MLX_FLASH_PROFILE says), where `mlx-flash plan` finds them.

    \b
    Examples:
      mlx-flash probe
      mlx-flash probe opt-6.7b-flash --plot reads.png
    """
    if plot:
        from ..bench.plots import check_plot

        check_plot(plot)
    from ..planning.probe import probe as measure
    from ..planning.profile import default_path, save_profile

    def say(line: str) -> None:
        if not quiet:
            click.echo(f"{line} …", err=True)

    profile = measure(folder, say)
    path = default_path()
    save_profile(profile, path)
    if plot:
        from ..bench.plots import plot_reads

        plot_reads(profile, plot)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(profile) | {"path": str(path)}))
    else:
        click.echo(table(profile))
        if not quiet:
            click.echo(f"kept in {path}", err=True)


def table(profile) -> str:
    """A profile for a person."""
    counts = sorted({p.threads for p in profile.flash})
    speeds = {(p.block_bytes, p.threads): p.bytes_per_s for p in profile.flash}
    lines = [
        f"{profile.device}, {profile.os}",
        "",
        "random reads, GB/s" + "".join(f"{f'{n} at once':>12}" for n in counts),
    ]
    for block in sorted({p.block_bytes for p in profile.flash}):
        cells = (speeds.get((block, n)) for n in counts)
        row = "".join(f"{'' if s is None else f'{s / 1e9:.3f}':>12}" for s in cells)
        lines.append(f"{f'{block // 1024:,} KiB':>18}{row}")
    lines += [
        "",
        f"in order       {profile.sequential_bytes_per_s / 1e9:8.2f} GB/s",
        f"memory copy    {profile.memory_bytes_per_s / 1e9:8.1f} GB/s",
    ]
    for rate in profile.rates:
        if rate.kernel == "matmul":
            kind = f"{rate.bits} bits, {rate.dtype}" if rate.bits else rate.dtype
            lines.append(
                f"{kind:<18} {rate.bytes_per_s / 1e9:8.3f} GB/s of weights for a "
                f"token, {rate.flops_per_s / 1e9:,.1f} GFLOP/s for a prompt"
            )
    if profile.notes:
        lines += ["", "Not surely cold: " + "; ".join(profile.notes) + "."]
    return "\n".join(lines)
