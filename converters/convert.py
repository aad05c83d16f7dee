"""Write a flash folder from a checkpoint, one layer at a time."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from ..errors import FlashError
from ..inspection import verify
from ..storage.safetensors import write_error
from .blocks import BlockConversion
from .choice import Choice, choose, packing, stock_of
from .experts import ExpertConversion
from .fit import FitOptions
from .neurons import NeuronConversion
from .source import Source
from .workfolder import WorkFolder

CALIBRATION_TOKENS = 16384
ORDERS = ("coactivation", "checkpoint")
WEIGHT_DTYPES = ("float16", "bfloat16", "float32")
# A predictor that misses 5 % names about twice as many neurons as are active, and
# scattered reads bring about half as much as long ones: beyond a quarter to a third,
# reading everything in order is no slower, and exact. What is in memory already
# shifts that a little further.
USEFUL_SHARE = 0.4


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    rank: int | None = None,
    threshold: float | None = None,
    recall: float = 0.95,
    order: str = "coactivation",
    unit: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    resident_bits: int | None = None,
    overwrite: bool = False,
    delete_source: bool = False,
    progress: bool = True,
) -> Path:
    """Convert a checkpoint to a flash folder.

    One layer is in memory at a time, besides the hidden states of the calibration text.
    An interrupted conversion goes on with the first layer that was not finished when
    the same call is made again.

    Args:
        src: A local folder, or a hub name such as "facebook/opt-6.7b".
        dst: The folder to write.
        revision: Branch, tag or commit of a hub repository.
        dtype: "float16", "bfloat16" or "float32"; by default the checkpoint's own.
        calibration: A text file on which predictors are trained and measured; without
            one, text is sampled from the model itself.
        calibration_tokens: How much of it.
        rank: Of all predictors; 0 for none. By default the paper's pattern.
        threshold: Probability from which a neuron is predicted; by default each layer's
            is chosen so that `recall` of its active neurons are found.
        recall: See `threshold`.
        order: Of neurons on flash: "coactivation" (those that calibration predicts
            together lie together, so that a read brings several) or "checkpoint".
        unit: "neuron" or "block" for dense FFNs; by default neurons where the
            activation gives exact zeros, and calibration finds enough of them.
        bits: Quantise what goes to flash; by default it stays as it is.
        group_size: Weights that share a scale (64, or what `mode` prescribes).
        mode: MLX's quantisation: "affine", "mxfp4", "mxfp8" or "nvfp4".
        resident_bits: Quantise (affine) what stays in memory.
        overwrite: Replace `dst` if it is a flash folder.
        delete_source: Delete the checkpoint's weight files in the end, when every file
            of `dst` was read again and compared with its digest.
        progress: Show progress bars and decisions on stderr.

    Returns:
        `dst` as a path.

    Raises:
        FlashError: If the source is missing, damaged or not supported, changed since an
            interrupted conversion began, or the disk is full. `dst` is then untouched.
    """
    work = WorkFolder(Path(dst).expanduser())
    work.check_destination(overwrite)
    source = Source(src, revision)
    work.check_source(source.folder)
    choice = choose(source, unit)
    if choice.unit == "neuron":
        dtype = dtype or source.dtype()
    _check_request(dtype, rank, threshold, recall, order, calibration_tokens)
    options = {
        "unit": unit,
        "dtype": dtype,
        "calibration": str(calibration) if calibration else None,
        "calibration_tokens": calibration_tokens,
        "rank": rank,
        "threshold": threshold,
        "recall": recall,
        "order": order,
        "quantize": packing(bits, group_size, mode),
        "quantize_resident": packing(resident_bits, None, "affine"),
    }
    bars = functools.partial(tqdm, disable=not progress)
    say = functools.partial(print, file=sys.stderr) if progress else _silent
    try:
        work.begin({"source": source.fingerprint(), "options": options})
        try:
            with _no_mlx_cache():
                _run(
                    choice, source, work, FitOptions(rank, threshold, recall), bars, say
                )
        except BaseException:
            work.drop_if_empty()
            raise
        work.publish()
    except OSError as error:
        raise write_error(Path(error.filename or work.folder), error) from error
    if delete_source:
        verify(work.dst, _silent)
        for file in source.files:
            file.resolve().unlink()  # in the hub's cache, the link leads to the bytes
            file.unlink(missing_ok=True)
    return work.dst


def _run(choice: Choice, source, work: WorkFolder, fit: FitOptions, bars, say) -> None:
    options, unit = work.facts["options"], choice.unit
    say(choice.reason)
    if unit == "neuron":
        conversion = NeuronConversion(source, work, options, fit, bars)
        if options["unit"] or fit.rank == 0 or _useful(conversion, work, say):
            return conversion.run(choice.activation)
        unit = "block"
    kind = ExpertConversion if unit == "expert" else BlockConversion
    cast = getattr(mx, options["dtype"]) if options["dtype"] else None
    quantize = options["quantize"], options["quantize_resident"]
    kind(source, stock_of(source), work, cast, *quantize, bars).run()


def _useful(conversion: NeuronConversion, work: WorkFolder, say) -> bool:
    """Whether so few neurons are active that reading them alone pays."""
    if work.layers:  # decided by the run that was interrupted
        return work.layers[0]["predictor"] is not None
    share = conversion.active_share()
    say(f"{share:.0%} of the neurons are active on calibration text.")
    if share > USEFUL_SHARE:
        say(
            f"Above {USEFUL_SHARE:.0%} reading blocks in order is faster than reading "
            "neurons: converting to blocks (--unit neuron insists)."
        )
    return share <= USEFUL_SHARE


def _check_request(dtype, rank, threshold, recall, order, count) -> None:
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise FlashError(f"No dtype {dtype!r}. Choose {', '.join(WEIGHT_DTYPES)}.")
    if rank is not None and rank < 0:
        raise FlashError(f"A predictor cannot have rank {rank}. Give 0 for none.")
    if threshold is not None and not 0 < threshold < 1:
        raise FlashError(f"A threshold of {threshold} is no probability. Try 0.5.")
    if not 0 < recall <= 1:
        raise FlashError(f"A recall of {recall} is not possible. Try 0.95.")
    if order not in ORDERS:
        raise FlashError(f"No order {order!r}. Choose {' or '.join(ORDERS)}.")
    if count < 1:
        raise FlashError(f"{count} calibration tokens are too few. Try 16384.")


def _silent(*words) -> None:
    pass


@contextlib.contextmanager
def _no_mlx_cache() -> Iterator[None]:
    """MLX keeps freed memory for reuse; a conversion would rather not hold it."""
    before = mx.set_cache_limit(0)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
