"""Where a model lies on every machine: under the same name, as far as one can be."""

from pathlib import Path

from ..demo_models import DEMO_MODELS, demo_name


def part_name(part: int, parts: int) -> str:
    """The folder that `mlx-flash split` writes for one of several machines.

    >>> part_name(0, 2)
    'part-1-of-2'
    """
    return f"part-{part + 1}-of-{parts}"


def portable(path: str | Path) -> str:
    """A path or a hub name as another machine understands it."""
    place = Path(path)
    if name := demo_name(place):
        return name
    if place.is_absolute() and place.is_relative_to(Path.home()):
        return f"~/{place.relative_to(Path.home())}"
    return str(path)


def on_rank(path: str, rank: int, size: int) -> str | Path:
    """What `portable` gave on rank 0, as it is on another rank.

    Rank 0's part of a split model stands for the part of each.
    """
    if path in DEMO_MODELS:
        return DEMO_MODELS[path]
    place = Path(path)
    if place.name == part_name(0, size):
        path = str(place.with_name(part_name(rank, size)))
    return Path(path).expanduser() if path.startswith("~") else path
