"""The command line: parse, call the library, print. One module a command.

Text goes to stdout, progress and figures to stderr. Nothing here imports MLX before a
command runs, so that `--help` answers at once.
"""

import os
import sys

import click

from .._version import __version__
from ..errors import FlashError
from ..machines import launched
from ..storage.open_files import check_limit
from . import (
    bench,
    chat,
    convert,
    generate,
    inspect,
    learn,
    models,
    plan,
    probe,
    replay,
    serve,
    split,
    top,
    trace,
    tune,
)
from .common import INTERRUPTED
from .hints import hint

TYPED = "mlx_flash.typed"  # where a context has the command line as it was
# These run on rank 0 of several machines, and the others do what it says.
RUN_MODELS = ("generate", "chat", "run", "serve", "bench")
HELP = {"help_option_names": ["-h", "--help"]}


class _Commands(click.Group):
    """Prints a FlashError as one line and ends with exit code 1."""

    def invoke(self, ctx):
        try:
            return self._invoke(ctx)
        except FlashError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    def parse_args(self, ctx, args):
        ctx.meta[TYPED] = list(args)
        return super().parse_args(ctx, args)

    def _invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            if found := hint(error, ctx.meta[TYPED]):
                raise click.UsageError(found, error.ctx) from error
            raise
        except ValueError:
            check_limit()  # which says in one line what mlx-lm failed at
            raise


@click.group(cls=_Commands, context_settings=HELP)
@click.version_option(__version__, prog_name="mlx-flash")
@click.pass_context
def main(ctx):
    """Run language models larger than this machine's memory.

    FFN weights stay on the SSD and are read as they are needed; the rest is MLX and
    mlx-lm.
    """
    # Else transformers, of which only tokenizers are used, asks for PyTorch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if launched() and ctx.invoked_subcommand in RUN_MODELS:
        from ..loading import follow_rank_0

        follow_rank_0()


for command in (
    generate.generate,
    chat.chat,
    convert.convert,
    split.split,
    serve.serve,
    top.top,
    inspect.info,
    inspect.verify,
    models.list_models,
    models.remove_model,
    trace.trace,
    learn.learn,
    replay.replay,
    plan.plan,
    probe.probe,
    tune.tune,
    bench.bench,
):
    # Said again for whoever runs a command without the group.
    command.context_settings.update(HELP)
    main.add_command(command)
main.add_command(chat.chat, "run")
