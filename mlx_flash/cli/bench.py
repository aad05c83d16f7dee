"""`mlx-flash bench`: measure this machine, and compare with the paper and with peers.

A command is made of a benchmark's `run`: its parameters are the options, its docstring
is the help, and the report that it returns is printed. Tables go to stdout as Markdown;
`--json` keeps everything that was measured.
"""

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_origin

import click

from .common import plot_option
from .tables import markdown_option, print_report

# Said here too, so that listing the commands does not load MLX.
BENCHMARKS = {
    "compare": "Two reports of a benchmark side by side.",
    "families": "Compare every family from flash with the same model in memory.",
    "machines": "One model on several ranks of this machine, beside one.",
    "memory": "What processes that convert and generate hold.",
    "moe": "A mixture of experts larger than its memory.",
    "overlap": "Reading while MLX computes, and reading early.",
    "paper": "The paper's tables beside what the cost model makes of them.",
    "peers": "mlx-flash beside mlx-lm, llama.cpp and accelerate.",
    "peers-dense": "mlx-flash beside mlx-lm and neurostream, a dense model.",
    "peers-moe": "mlx-flash beside mlx-lm, mlx-vlm, boyle and BigRig.",
    "perplexity": "What prediction costs in quality on TEXT.",
    "placement": "Orders of a model's neurons on flash, played with TEXT.",
    "plan-check": "The cost model of `mlx-flash plan` beside runs here.",
    "prompts": "What a prompt reads and holds, through each entry point.",
    "report": "This machine in one table to paste: a probe and three models.",
    "reader": "Reader and slot cache on OPT-6.7B's bundles, beside fio.",
    "skip": "What skipping neurons costs on TEXT, and what it saves.",
    "sweep": "Tokens/s, bytes per token and hit rate over memory budgets.",
    "table2": "The I/O of a token, with each part of the paper's method.",
    "table3": "A token end to end: naive, hybrid and all of the method.",
    "waits": "Waits of the host for MLX, modelled for Apple's chips.",
    "whole": "What the engine costs where everything fits in memory.",
}
# Of those whose module is not called like the command
MODULES = {
    "compare": "compare_reports",
    "families": "families.table",
    "machines": "machines.compare",
    "peers": "peers.compare",
    "peers-dense": "peers.dense",
    "peers-moe": "peers.experts",
    "report": "machine_report",
}
DRAWN = {"moe", "overlap", "peers", "plan-check", "sweep", "table2", "table3"}
PASTED = {"report", "compare"}  # always in Markdown
FILE = click.Path(dir_okay=False, writable=True, path_type=Path)


class _Benchmarks(click.Group):
    """Makes a command when it is asked for."""

    def list_commands(self, ctx):
        return sorted(BENCHMARKS)

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl(sorted(BENCHMARKS.items()))

    def get_command(self, ctx, name):
        if name not in BENCHMARKS:
            return None
        if name not in self.commands:
            module = MODULES.get(name, name.replace("-", "_"))
            run = importlib.import_module(f"mlx_flash.bench.{module}").run
            self.add_command(make_command(name, run))
        return self.commands[name]


@click.group(cls=_Benchmarks)
def bench():
    """Measure what running from flash costs on this machine."""


def make_command(name: str, run: Callable) -> click.Command:
    """The command of a benchmark.

    Args:
        run: Returns a `bench.report.Report`, or None if it prints by itself; its
            parameters are typed as `bench/options.py` says.
    """
    signature = inspect.signature(run, eval_str=True)

    def command(
        as_json: Path | None, markdown: bool, plot: Path | None = None, **options
    ) -> None:
        from ..bench.plots import check_plot, draw

        if plot:
            check_plot(plot)  # before anything is measured
        report = run(**options)
        report.facts["options"] = options | report.facts.get("options", {})
        print_report(report, markdown or name in PASTED)
        if as_json:
            report.write(as_json)
            click.echo(f"{as_json} has the report.", err=True)
        if plot:
            draw(report, plot)
            click.echo(f"{plot} has the plot.", err=True)

    parameters = [_parameter(p) for p in signature.parameters.values()]
    made = click.Command(
        name, callback=run, params=parameters, help=inspect.getdoc(run)
    )
    if signature.return_annotation is not None:
        made.callback = command
        json_option = ["--json", "as_json"]
        made.params.append(click.Option(json_option, type=FILE, help="Write a report."))
        markdown_option(made)
        if name in DRAWN:
            plot_option("the rows")(made)
    return made


def _parameter(parameter: inspect.Parameter) -> click.Parameter:
    annotation = parameter.annotation
    kind = getattr(annotation, "__origin__", annotation)
    is_flag = isinstance(parameter.default, bool)
    # Of a flag, and of none of several, the default is no news.
    shown = not is_flag and parameter.default != ()
    settings: dict[str, Any] = {"show_default": shown}
    for note in getattr(annotation, "__metadata__", ()):
        if isinstance(note, dict):
            settings |= note
        else:
            settings["help" if isinstance(note, str) else "type"] = note
    if parameter.default is parameter.empty:
        return click.Argument([parameter.name], type=settings["type"])
    flag = f"--{parameter.name.replace('_', '-')}"
    if parameter.default is True:
        flag = f"{flag}/--no-{flag[2:]}"
    return click.Option(
        [flag, parameter.name],
        default=parameter.default,
        multiple=get_origin(kind) is tuple,
        is_flag=is_flag,
        **settings,
    )
