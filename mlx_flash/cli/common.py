"""What several commands share."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import FlashError

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"
DEMO_MEMORY = "50%"
INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


class Memory(click.ParamType):
    """7GB, 512MB, 50% or auto."""

    name = "SIZE|PERCENT|auto"

    def convert(self, value, param, ctx):
        from ..memory_size import parse_memory

        try:
            parse_memory(value)
        except FlashError as error:
            self.fail(str(error), param, ctx)
        return value
