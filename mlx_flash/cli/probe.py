"""`mlx-flash probe`: measure this machine, and keep the figures for `plan`."""

import dataclasses
import json
from pathlib import Path

import click

from .common import json_option, plot_option


@click.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@json_option
@plot_option("the throughput over the length of reads")
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
    from ..planning.text import profile_text
    from ..profile import default_path, save_profile

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
        click.echo(profile_text(profile))
        if not quiet:
            click.echo(f"kept in {path}", err=True)
