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
AFFINE_GROUPS = (32, 64, 128)
# What predictors are fitted by: of no use where there are none
FITTING = ("calibration", "calibration_tokens", "threshold", "recall", "fit_steps")


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
        blocks: Of a mixture of experts, put dense FFNs and shared experts on flash,
            too, as blocks. By default they stay in memory.
        skippable: Cut gated FFNs into neurons whose gates stay in memory, and find out
            while converting what it costs to skip shares of them.
        bits: Quantise what goes to flash; by default it stays as it is.
        group_size: Weights that share a scale (64, or what `mode` prescribes).
        mode: MLX's quantisation: "affine", "mxfp4", "mxfp8" or "nvfp4".
        resident_bits: Quantise (affine) what stays in memory.
        share: "1/2" keeps the first of two machines' parts of the units alone.
        shares: "2:1" with `share`, where the machines' parts are not alike.
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
    blocks: bool = False
    skippable: bool = False
    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    resident_bits: int | None = None
    share: str | None = None
    shares: str | None = None
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
            self.unit is None or not self.skippable,
            f"--skippable chooses the unit: leave out --unit {self.unit}.",
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
        need(
            self.share is not None or self.shares is None,
            f"--shares {self.shares} is for one part of several: give --share 1/2 too.",
        )
        need(
            self.share is None or not self.delete_source,
            "--delete-source would delete what the other machines' parts are made of. "
            "Leave it out, and delete the checkpoint when every machine has its part.",
        )
        # Both raise for a quantisation that MLX does not have.
        _packing(self.bits, self.group_size, self.mode)
        _packing(self.resident_bits, None, "affine")

    def check_used(self, unit: str, name: str) -> None:
        """Refuse what would be ignored when `name` is converted to such units.

        Raises:
            FlashError: Naming the options, and why they have no meaning.
        """
        if self.blocks and unit != "expert":
            raise FlashError(
                f"--blocks would be ignored: it is for mixtures of experts, and {name} "
                f"becomes {unit}s. Leave it out."
            )
        given = [x for x in FITTING if getattr(self, x) != getattr(type(self), x)]
        if unit == "gated neuron":
            given = [x for x in given if not x.startswith("calibration")]
            given += ["rank"] if self.rank else []
            why = "the gates themselves choose the neurons"
        elif unit != "neuron":
            given += ["rank"] if self.rank else []
            why = f"{name} becomes {unit}s, which have none"
        elif self.rank == 0:
            why = "--rank 0 makes none"
        elif self.threshold is not None and "recall" in given:
            given, why = ["recall"], "--threshold sets them"
        else:
            return
        if given:
            options = " and ".join(f"--{x.replace('_', '-')}" for x in given)
            raise FlashError(
                f"{options} would be ignored: it is for predictors, and {why}. Leave "
                "it out."
            )

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
        if self.skippable:
            facts["skippable"] = True
        facts["calibration"] = str(self.calibration) if self.calibration else None
        facts["quantize"] = self.packing
        facts["quantize_resident"] = self.resident_packing
        if self.blocks:
            facts["blocks"] = True
        if self.share:  # absent from what an earlier version's interrupted run noted
            facts |= {"share": self.share, "shares": self.shares}
        return facts


def _packing(bits: int | None, group_size: int | None, mode: str) -> dict | None:
    if mode not in PACKINGS:
        raise FlashError(
            f"No quantisation mode {mode!r}. Choose {', '.join(PACKINGS)}."
        )
    only_size, only_bits = PACKINGS[mode]
    if bits is None and only_bits is None:
        if group_size is not None:
            raise FlashError(
                f"Groups of {group_size} are for quantised weights: give --bits too, "
                "or leave out --group-size."
            )
        return None
    wanted = {
        "group_size": only_size or 64 if group_size is None else group_size,
        "bits": only_bits if bits is None else bits,
    }
    if only_bits and wanted != {"group_size": only_size, "bits": only_bits}:
        raise FlashError(
            f"{mode} has {only_bits} bits in groups of {only_size}, and nothing else. "
            "Leave out --bits and --group-size, or choose --mode affine."
        )
    if not only_bits and wanted["bits"] not in AFFINE_BITS:
        raise FlashError(
            f"MLX has no affine quantisation of {wanted['bits']} bits. Choose "
            f"{_either(AFFINE_BITS)}, or leave out the option for weights as they are."
        )
    if not only_bits and wanted["group_size"] not in AFFINE_GROUPS:
        raise FlashError(
            f"MLX has no affine quantisation in groups of {wanted['group_size']}. "
            f"Choose {_either(AFFINE_GROUPS)}."
        )
    return wanted | {"mode": mode}


def _either(values: tuple[int, ...]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}"
