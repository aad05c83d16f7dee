"""`mlx-flash bench`: measure this machine, and compare with the paper and with peers.

Tables go to stdout as Markdown; `--json` keeps everything that was measured.
"""

from __future__ import annotations

import click

from . import engine, memory, models, paper


@click.group()
def bench():
    """Measure what running from flash costs on this machine."""


for command in (
    paper.table2,
    paper.table3,
    paper.paper,
    paper.peers,
    engine.reader,
    engine.placement,
    engine.overlap,
    engine.whole,
    memory.sweep,
    memory.memory,
    memory.moe,
    models.perplexity,
    models.families,
    models.plan_check,
):
    bench.add_command(command)
