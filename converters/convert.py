"""Write a flash folder from a checkpoint, one layer at a time."""

import dataclasses
from pathlib import Path

import mlx.core as mx

from ..checkpoints.gates import find_gated
from ..checkpoints.units import activation, find_units
from ..errors import FlashError
from ..inspection import verify
from ..layers.kinds import BLOCK, EXPERT, GATED, NEURON, UnitKind
from ..storage.digests import file_sha256
from ..storage.files import sync
from ..storage.identity import identity
from ..storage.manifest import MANIFEST
from ..storage.safetensors import write_error
from .calibrate.calibrator import Calibrator
from .conversion import Cutter, Job, write_folder
from .gated import GatedCutter
from .lock import Lock
from .neurons import NeuronCutter
from .options import ConvertOptions
from .portion import Portion, parse_portion
from .source import Source
from .tensors import TensorCutter
from .workfolder import WorkFolder

# A predictor that misses 5 % names about twice as many neurons as are active, and
# scattered reads bring about half as much as long ones: beyond a quarter to a third,
# reading everything in order is no slower, and exact. What is in memory already
# shifts that a little further.
USEFUL_SHARE = 0.4


def convert(src: str | Path, dst: str | Path, **options) -> Path:
    """Convert a checkpoint to a flash folder.

    One layer is in memory at a time, besides the hidden states of the calibration text.
    An interrupted conversion goes on with the first layer that was not finished when
    the same call is made again.

    Args:
        src: A local folder, or a hub name such as "facebook/opt-6.7b".
        dst: The folder to write.
        **options: Any of `ConvertOptions`, which describes them.

    Returns:
        `dst` as a path.

    Raises:
        FlashError: If the source is missing, damaged or not supported, changed since an
            interrupted conversion began, an option is not possible, or the disk is
            full. `dst` is then untouched.
        TypeError: If there is no option of such a name.
    """
    asked = ConvertOptions(**options)
    portion = parse_portion(asked.share, asked.shares) if asked.share else None
    work = WorkFolder(Path(dst).expanduser())
    path = Path(src).expanduser()
    if asked.revision and path.exists():
        raise FlashError(
            f"--revision would be ignored: {src} is a folder here, and only a hub "
            "repository has revisions. Leave it out."
        )
    request = {
        "source": str(path.resolve()) if path.exists() else str(src),
        "revision": asked.revision,
        "options": asked.facts(),
    }
    with Lock(work.dst) as lock:
        try:
            if not _is_finished(work, lock, request):
                work.check_destination(asked.overwrite)
                source = Source(src, asked.revision)
                work.check_source(source.folder)
                _fill(work, source, asked, portion)
                manifest = file_sha256(work.folder / MANIFEST)
                weights = {
                    str(file.absolute()): source.fingerprint[file.name]
                    for file in source.files
                }
                note = {"request": request, "manifest": manifest, "weights": weights}
                lock.write(note)
                work.publish()
            work.discard()
            if asked.delete_source:
                _delete_weights(lock.note["weights"], work.dst)
        except OSError as error:
            raise write_error(Path(error.filename or work.folder), error) from error
    return work.dst


def _fill(
    work: WorkFolder, source: Source, asked: ConvertOptions, portion: Portion | None
) -> None:
    """Write the flash folder in the work folder, all of it or what is missing."""
    kind, reason = choose(source, asked.unit, asked.skippable)
    asked.check_used(kind.name, source.name)
    floats = kind in (NEURON, GATED) and not source.packing
    if floats and asked.dtype is None:
        asked = dataclasses.replace(asked, dtype=source.dtype())
    job = Job(source, work, asked, portion)
    # MLX keeps freed memory for reuse; a conversion would rather not hold it.
    before = mx.set_cache_limit(0)
    try:
        work.begin({"source": source.fingerprint, "options": asked.facts()})
        try:
            job.say(reason)
            write_folder(job, _cutter(job, kind))
        except BaseException:
            work.drop_if_empty()
            raise
    finally:
        mx.set_cache_limit(before)


def _is_finished(work: WorkFolder, lock: Lock, request: dict) -> bool:
    """Whether an earlier run of the same command came as far as the final name."""
    if not lock.note:
        return False
    note, manifest = lock.note, work.dst / MANIFEST
    named = not work.folder.exists() and manifest.is_file()
    if named and file_sha256(manifest) == note.get("manifest"):
        files = {Path(name): seen for name, seen in note["weights"].items()}
        unchanged = all(identity(f) == files[f] for f in files if f.exists())
        if note["request"] == request and unchanged:
            return True
        work.discard()
    lock.write({})
    return False


def choose(
    source: Source, unit: str | None = None, skippable: bool = False
) -> tuple[UnitKind, str]:
    """The kind of unit for a checkpoint, and a sentence that says why.

    `unit` is "neuron" or "block" if somebody asked for it, `skippable` whether for
    neurons whose gates stay in memory.
    """
    name = source.name
    if skippable:
        found = find_gated(source.make_model(), source.config, name)
        return GATED, f"{len(found)} FFNs become neurons whose gates stay in memory."
    kind, ffns, why_not = find_units(source.make_model(), source.config, name)
    if kind is EXPERT:
        if unit:
            raise FlashError(
                f"{name} is a mixture of experts: each becomes a bundle. Leave out "
                f"--unit {unit}."
            )
        return EXPERT, f"{len(ffns)} layers of experts."
    if unit == NEURON.name and why_not:
        raise FlashError(f"{name} {why_not}. It can become blocks: leave out --unit.")
    if unit == BLOCK.name or why_not:
        reason = f"{name} {why_not}" if why_not else "Blocks were asked for"
        return BLOCK, f"{reason}: its {len(ffns)} FFNs become blocks."
    zeros = f"whose activation ({activation(source.config)}) gives exact zeros"
    return NEURON, f"{len(ffns)} FFNs {zeros}."


def _cutter(job: Job, kind: UnitKind) -> Cutter:
    """Who cuts the FFNs: into blocks where too many neurons are active for neurons."""
    if kind is GATED:
        return GatedCutter(job)
    if kind is not NEURON:
        return TensorCutter(job, kind)
    neurons = NeuronCutter(job)
    calibrator = neurons.calibrator
    if job.options.unit or calibrator is None or _pays(job, calibrator):
        return neurons
    return TensorCutter(job, BLOCK)


def _pays(job: Job, calibrator: Calibrator) -> bool:
    """Whether so few neurons are active that reading them alone pays."""
    if job.work.layers:  # decided by the run that was interrupted
        return job.work.layers[0].predictor is not None
    share = calibrator.active_share()
    job.say(f"{share:.0%} of the neurons are active on calibration text.")
    if share > USEFUL_SHARE:
        job.say(
            f"Above {USEFUL_SHARE:.0%} reading blocks in order is faster than reading "
            "neurons: converting to blocks (--unit neuron insists)."
        )
    return share <= USEFUL_SHARE


def _delete_weights(weights: dict[str, list[int]], folder: Path) -> None:
    """Delete weight files that are as they were read, once `folder` proved sound.

    Args:
        weights: The identity of each by its path; an earlier run may have deleted some.
    """
    verify(folder, lambda file: None)
    for name, seen in weights.items():
        file = Path(name)
        if file.exists() and identity(file) != seen:
            raise FlashError(
                f"{file} changed since it was converted to {folder}, and was not "
                "deleted. Look at it, then convert or delete it yourself."
            )
    for file in map(Path, weights):
        target = file.resolve()  # in the hub's cache, links lead there
        target.unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        for parent in {target.parent, file.parent}:
            sync(parent)
