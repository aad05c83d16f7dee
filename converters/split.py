"""Split a flash folder into parts, one for each of several machines.

A part has the whole configuration, tokenizer, resident weights and predictors, and the
bundles of its own units, bit for bit.
"""

from contextlib import ExitStack, suppress
from pathlib import Path

from ..checkpoints.hub import find_model
from ..checkpoints.record import check_files
from ..checkpoints.shelf import shelf
from ..errors import FlashError
from ..machines.paths import part_name
from ..storage.manifest_reading import read_manifest
from .bundles import StoredBundles
from .lock import Lock
from .parts import Part, write_parts
from .portion import Portion, shares_of
from .workfolder import WorkFolder


def split(
    src: str | Path,
    machines: int,
    dst: str | Path | None = None,
    *,
    shares: str | None = None,
    part: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Split a flash folder into parts, each of which one machine keeps.

    An interrupted run goes on with the first layer that was not finished when the same
    call is made again. Parts that it finished are not written again.

    Args:
        src: A flash folder, or a hub name of one.
        machines: How many parts.
        dst: The folder to write the parts into; by default `<src>-split` beside it.
        shares: How units are shared out, such as "2:1"; by default all alike.
        part: The one to write, from 1 on; by default all of them.
        overwrite: Replace parts that are there.
        progress: Show a progress bar on stderr.

    Returns:
        The folders of the parts.

    Raises:
        FlashError: If the source is no whole flash folder, or damaged, the shares leave
            a machine without units of a layer, a part is there already, or the disk is
            full. No part is then half there.
    """
    if machines < 2 or (part is not None and not 1 <= part <= machines):
        raise FlashError(
            f"There is no part {part or 1} of {machines}. Give two machines or more, "
            "and one of their parts."
        )
    made_of = shares_of(machines, shares)
    folder = find_model(src)
    manifest = read_manifest(folder)
    if manifest.share is not None:
        raise FlashError(
            f"{folder} holds {manifest.share} already. Split the whole model."
        )
    check_files(folder, "sample")
    for layer in manifest.layers:
        Portion(made_of, 0).owned(
            layer.module, StoredBundles(folder / layer.file, layer)
        )
    place = Path(dst).expanduser() if dst else default_place(src, folder)
    chosen = range(machines) if part is None else [part - 1]
    parts = []
    for number in chosen:
        portion = Portion(made_of, number)
        share = portion.stored(
            folder, manifest.resident, manifest.layers, manifest.beside
        )
        work = WorkFolder(place / part_name(number, machines))
        parts.append(Part(portion, share, work))
    was_there = place.exists()
    try:
        with ExitStack() as locks:
            for entry in parts:
                locks.enter_context(Lock(entry.work.dst))
            write_parts(folder, manifest, parts, overwrite, progress)
    finally:
        if not was_there:
            with suppress(OSError):  # it has something in it
                place.rmdir()
    return [entry.work.dst for entry in parts]


def default_place(src: str | Path, folder: Path) -> Path:
    """Where parts go without another word: beside a folder that is the user's own."""
    if folder.parent.name == "snapshots":  # in the hub's cache
        return Path(f"{str(src).rsplit('/', 1)[-1]}-split").absolute()
    folder = folder.resolve()
    if folder.parent == shelf().resolve():
        return Path(f"{folder.name}-split").absolute()
    return folder.with_name(f"{folder.name}-split")
