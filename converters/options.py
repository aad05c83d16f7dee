"""What a conversion may be asked for. Imports no MLX: the command line reads it."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import FlashError

WEIGHT_DTYPES = ("float16", "bfloat16", "float32")
ORDERS = ("coactivation", "checkpoint")
DENSE_UNITS = ("neuron", "block")
# Mode → the one group size and the one number of bits that it allows, if it does so
PACKINGS = {
    "affine": (None, None),
    "mxfp4": (32, 4),
    "mxfp8": (32, 8),
    "nvfp4": (16, 4),
}
AFFINE_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert a checkpoint.

    Attributes:
        revision: Branch, tag or commit of a hub repository.
        dtype: "float16", "bfloat16" or "float32"; by default the checkpoint's own.
        calibration: A text file on which predictors are trained and measured; without
            one, text is sampled from the model itself.
        calibration_tokens: How much of it.
        rank: Of all predictors; 0 for none. By default the paper's pattern.
        threshold: Probability from which a neuron is predicted; by default each layer's
            is chosen so that `recall` of its active neurons are found.
        recall: See `threshold`.
        fit_steps: Training steps of a predictor, at least: two passes over the text
            are made where that is more.
        order: Of neurons on flash: "coactivation" (those that calibration predicts
            together lie together, so that a read brings several) or "checkpoint".
        unit: "neuron" or "block" for dense FFNs; by default neurons where the
            activation gives exact zeros, and calibration finds enough of them.
        bits: Quantise what goes to flash; by default it stays as it is.
        group_size: Weights that share a scale (64, or what `mode` prescribes).
        mode: MLX's quantisation: "affine", "mxfp4", "mxfp8" or "nvfp4".
        resident_bits: Quantise (affine) what stays in memory.
        overwrite: Replace the destination if it is a flash folder.
        delete_source: Delete the checkpoint's weight files in the end, when every file
            of the flash folder was read again and compared with its digest.
        progress: Show progress bars and decisions on stderr.

    Raises:
        FlashError: If a value is not possible.
    """

    revision: str | None = None
    dtype: str | None = None
    calibration: str | Path | None = None
    calibration_tokens: int = 16384
    rank: int | None = None
    threshold: float | None = None
    recall: float = 0.95
    fit_steps: int = 400
    order: str = "coactivation"
    unit: str | None = None
    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    resident_bits: int | None = None
    overwrite: bool = False
    delete_source: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        def need(possible: bool, refusal: str) -> None:
            if not possible:
                raise FlashError(refusal)

        need(
            self.unit in (None, *DENSE_UNITS),
            f"No unit {self.unit!r} can be chosen. Choose {' or '.join(DENSE_UNITS)}.",
        )
        need(
            self.dtype in (None, *WEIGHT_DTYPES),
            f"No dtype {self.dtype!r}. Choose {', '.join(WEIGHT_DTYPES)}.",
        )
        need(
            self.rank is None or self.rank >= 0,
            f"A predictor cannot have rank {self.rank}. Give 0 for none.",
        )
        need(
            self.threshold is None or 0 < self.threshold < 1,
            f"A threshold of {self.threshold} is no probability. Try 0.5.",
        )
        need(
            0 < self.recall <= 1,
            f"A recall of {self.recall} is not possible. Try 0.95.",
        )
        need(self.fit_steps > 0, f"{self.fit_steps} fit steps are too few. Try 400.")
        need(
            self.order in ORDERS,
            f"No order {self.order!r}. Choose {' or '.join(ORDERS)}.",
        )
        need(
            self.calibration_tokens > 0,
            f"{self.calibration_tokens} calibration tokens are too few. Try 16384.",
        )
        # Both raise for a quantisation that MLX does not have.
        _packing(self.bits, self.group_size, self.mode)
        _packing(self.resident_bits, None, "affine")

    @property
    def packing(self) -> dict | None:
        """What `mx.quantize` takes for the bundles; None for weights as they are."""
        return _packing(self.bits, self.group_size, self.mode)

    @property
    def resident_packing(self) -> dict | None:
        """The same for what stays in memory."""
        return _packing(self.resident_bits, None, "affine")

    def facts(self) -> dict:
        """All that decides what is written, as JSON: a resumed run must repeat it."""
        names = ("unit", "dtype", "calibration_tokens", "rank", "threshold", "recall")
        facts = {name: getattr(self, name) for name in (*names, "fit_steps", "order")}
        facts["calibration"] = str(self.calibration) if self.calibration else None
        facts["quantize"] = self.packing
        facts["quantize_resident"] = self.resident_packing
        return facts


def _packing(bits: int | None, group_size: int | None, mode: str) -> dict | None:
    if mode not in PACKINGS:
        raise FlashError(
            f"No quantisation mode {mode!r}. Choose {', '.join(PACKINGS)}."
        )
    if bits is None and mode == "affine":
        return None
    only_size, only_bits = PACKINGS[mode]
    packing = {"group_size": group_size or only_size or 64, "bits": bits or only_bits}
    sound = only_size in (None, packing["group_size"]) and (
        packing["bits"] == only_bits if only_bits else packing["bits"] in AFFINE_BITS
    )
    if not sound or packing["group_size"] not in (16, 32, 64, 128):
        raise FlashError(
            f"MLX has no {mode} quantisation of {packing['bits']} bits in groups of "
            f"{packing['group_size']}. Try --bits 4 --group-size 64."
        )
    return packing | {"mode": mode}
