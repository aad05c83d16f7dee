"""`mlx-flash top`: what happens inside of a served model, in the terminal."""

from __future__ import annotations

import json
import time

import click

from .common import json_option

DEFAULT_URL = "http://localhost:8080"


@click.command()
@click.argument("url", default=DEFAULT_URL)
@click.option("--once", is_flag=True, help="Print one picture and end.")
@json_option
@click.option(
    "--interval",
    type=click.FloatRange(0.1),
    default=0.5,
    show_default=True,
    help="Seconds between two pictures.",
)
@click.option("--api-key", envvar="MLX_FLASH_API_KEY", help="Of the server, if any.")
def top(url, once, as_json, interval, api_key):
    """Watch a server of mlx-flash: speed, hits, memory, and where each unit is.

    URL is what the server named when it was ready.

    \b
    Examples:
      mlx-flash top
      mlx-flash top http://studio.local:8080 --api-key SECRET
      mlx-flash top --once --json | jq .memory
    """
    from rich.console import Console
    from rich.live import Live

    from .top_frame import Past, frame
    from .top_state import read_state

    if as_json:
        click.echo(json.dumps(read_state(url, api_key)))
        return
    console = Console()
    if once or not console.is_terminal:
        console.print(frame(read_state(url, api_key), Past(), console))
        return
    past = Past()
    # The first one outside, so that a wrong address is one line and no empty screen.
    picture = frame(read_state(url, api_key), past, console, console.height)
    with Live(picture, console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            state = read_state(url, api_key)
            live.update(frame(state, past, console, console.height), refresh=True)
