"""`mlx-flash split`: a flash folder in parts, one for each of several machines."""

import click


@click.command()
@click.argument("model")
@click.option(
    "-n",
    "--machines",
    type=click.IntRange(2),
    required=True,
    help="How many machines will run the model together.",
)
@click.option(
    "--shares",
    metavar="2:1",
    help="How the units of each layer are shared out.  [default: all alike]",
)
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    help="Where to write the parts.  [default: MODEL-split, beside MODEL]",
)
@click.option("--part", type=click.IntRange(1), help="Write this part alone.")
@click.option("--overwrite", is_flag=True, help="Replace parts that are there.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar.")
def split(model, machines, output, quiet, **options):
    """Split MODEL, a flash folder, into a part for each of several machines.

    A part has all that stays in memory, and a share of the units of each layer.
    Interrupted, it goes on where it stopped when the same command is run again.

    \b
    Examples:
      mlx-flash split opt-6.7b-flash -n 2
      mlx-flash split opt-6.7b-flash -n 2 --shares 2:1 -o parts --part 1
    """
    from ..converters.split import split as run
    from ..library.opening import converted

    try:
        parts = run(
            converted(model) or model, machines, output, progress=not quiet, **options
        )
    except KeyboardInterrupt:
        click.echo("Interrupted. The same command goes on where it stopped.", err=True)
        raise
    if quiet:
        return
    if options["part"]:
        click.echo(
            f"{parts[0]} is ready: copy it to machine {options['part']} of {machines}, "
            "under the same path.",
            err=True,
        )
        return
    names = ", ".join(part.name for part in parts)
    click.echo(
        f"{names} are ready in {parts[0].parent}: copy each to one machine, in this "
        "order, under the same path, and run them together: mlx.launch … mlx-flash "
        f'generate "…" --model {parts[0]}',
        err=True,
    )
