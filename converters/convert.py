"""Write a flash folder from a checkpoint, one layer at a time."""

import dataclasses
from pathlib import Path

import mlx.core as mx

from ..checkpoints.units import activation, find_units
from ..errors import FlashError
from ..inspection import verify
from ..layers.kinds import BLOCK, EXPERT, NEURON, UnitKind
from ..storage.safetensors import write_error
from .calibrate.calibrator import Calibrator
from .conversion import Cutter, Job, write_folder
from .neurons import NeuronCutter
from .options import ConvertOptions
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
    work = WorkFolder(Path(dst).expanduser())
    work.check_destination(asked.overwrite)
    source = Source(src, asked.revision)
    work.check_source(source.folder)
    kind, reason = choose(source, asked.unit)
    if kind is NEURON and asked.dtype is None:
        asked = dataclasses.replace(asked, dtype=source.dtype())
    job = Job(source, work, asked)
    # MLX keeps freed memory for reuse; a conversion would rather not hold it.
    before = mx.set_cache_limit(0)
    try:
        work.begin({"source": source.fingerprint(), "options": asked.facts()})
        try:
            job.say(reason)
            write_folder(job, _cutter(job, kind))
        except BaseException:
            work.drop_if_empty()
            raise
        work.publish()
    except OSError as error:
        raise write_error(Path(error.filename or work.folder), error) from error
    finally:
        mx.set_cache_limit(before)
    if asked.delete_source:
        _delete_weights(source, work.dst)
    return work.dst


def choose(source: Source, unit: str | None = None) -> tuple[UnitKind, str]:
    """The kind of unit for a checkpoint, and a sentence that says why.

    `unit` is "neuron" or "block" if somebody asked for it.
    """
    name = source.name
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


def _delete_weights(source: Source, folder: Path) -> None:
    """Delete the checkpoint's weights, once every byte of `folder` proved sound."""
    verify(folder, lambda file: None)
    for file in source.files:
        file.resolve().unlink()  # in the hub's cache, the link leads to the bytes
        file.unlink(missing_ok=True)
