"""Which units each step of a run asked for, in memory and as a file.

The file is NumPy's compressed npz: `facts`, JSON as uint8, and for layer i
    bits_i    uint8 [steps, ceil(units / 8)], as `np.packbits` packs them
    keep_i    the same of what was to stay in memory after a step in several waves
    tokens_i  int32 [steps]: how many tokens each step brought
    soon_i    float16 [steps, units]: how soon each unit was expected (`foresight`),
              where the model has somebody to expect it
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ..errors import FlashError

VERSION = 1
FACTS = ("model", "unit", "units", "unit_bytes", "warm")
ARRAYS = ("bits", "keep", "tokens")
SOON = "soon"


@dataclass(frozen=True)
class Trace:
    """The selections of one run.

    Attributes:
        model, unit: The flash folder's name, and what its units are.
        units, unit_bytes: Of each layer.
        bits, keep, tokens: Of each layer, as in the file.
        warm: How many steps of each layer came before figures count: the prompt.
        soon: Of each layer, as in the file; () where nothing was expected.
    """

    model: str
    unit: str
    units: tuple[int, ...]
    unit_bytes: tuple[int, ...]
    bits: tuple[np.ndarray, ...]
    keep: tuple[np.ndarray, ...]
    tokens: tuple[np.ndarray, ...]
    warm: tuple[int, ...]
    soon: tuple[np.ndarray, ...] = ()

    def steps(self, layer: int) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
        """(sorted unit ids, tokens, ids to keep) of each step of a layer."""
        of_layer = self.bits[layer], self.tokens[layer], self.keep[layer]
        for bits, tokens, keep in zip(*of_layer, strict=True):
            asked, kept = (
                np.flatnonzero(np.unpackbits(b, count=self.units[layer]))
                for b in (bits, keep)
            )
            yield asked, int(tokens), kept

    def asked(self, layer: int) -> float:
        """How many units of a layer a step asked for after the prompt, on average."""
        bits = self.bits[layer][self.warm[layer] :]
        return float(np.unpackbits(bits).sum() / max(len(bits), 1))

    def save(self, path: Path) -> None:
        """Write the trace.

        Raises:
            FlashError: If the file cannot be written.
        """
        facts = {"version": VERSION} | {name: getattr(self, name) for name in FACTS}
        arrays = {"facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
        for name in (*ARRAYS, SOON):
            for i, array in enumerate(getattr(self, name)):
                arrays[f"{name}_{i}"] = array
        try:
            with open(path, "wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
        except OSError as error:
            raise FlashError(
                f"{path} cannot be written: {error.strerror}. Choose another -o."
            ) from error


def read_trace(path: Path) -> Trace:
    """Read a trace and check that its parts fit together.

    Raises:
        FlashError: If it is missing, damaged, newer, or no trace at all.
    """
    try:
        with open(path, "rb") as data, np.load(data, allow_pickle=False) as file:
            facts = json.loads(file["facts"].tobytes())
            if facts["version"] > VERSION:
                raise FlashError(
                    f"{path} is of version {facts['version']}, newer than this "
                    "mlx-flash reads. Update it, or record the trace again."
                )
            trace = _parse(facts, file)
        _check(trace)
    except (OSError, ValueError, LookupError, TypeError, EOFError, BadZipFile) as error:
        # NumPy has an OSError of its own for what is neither zip nor pickle.
        if isinstance(error, OSError) and error.strerror:
            raise FlashError(f"{path} cannot be read: {error.strerror}.") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FlashError(
            f"{path} is no whole trace ({reason}). "
            "Record one: mlx-flash trace PROMPT -o FILE"
        ) from error
    return trace


def _parse(facts: dict, arrays: Mapping[str, np.ndarray]) -> Trace:
    layers = range(len(facts["units"]))
    return Trace(
        model=str(facts["model"]),
        unit=str(facts["unit"]),
        units=tuple(int(n) for n in facts["units"]),
        unit_bytes=tuple(int(n) for n in facts["unit_bytes"]),
        bits=tuple(arrays[f"bits_{i}"] for i in layers),
        keep=tuple(arrays[f"keep_{i}"] for i in layers),
        tokens=tuple(arrays[f"tokens_{i}"] for i in layers),
        warm=tuple(int(n) for n in facts["warm"]),
        soon=tuple(arrays[f"{SOON}_{i}"] for i in layers if f"{SOON}_{i}" in arrays),
    )


def _check(trace: Trace) -> None:
    """Raise a ValueError if the parts of a trace contradict each other."""
    if not trace.units:
        raise ValueError("it has no layers")
    if not len(trace.units) == len(trace.unit_bytes) == len(trace.warm):
        raise ValueError("its facts are of several numbers of layers")
    if len(trace.soon) not in (0, len(trace.units)):
        raise ValueError("of some layers it has not what was expected")
    for i, units in enumerate(trace.units):
        steps = len(trace.tokens[i])
        for marks in (trace.bits[i], trace.keep[i]):
            if marks.dtype != np.uint8 or marks.shape != (steps, -(-units // 8)):
                raise ValueError(f"layer {i} is not of {units} units")
        if trace.soon and trace.soon[i].shape != (steps, units):
            raise ValueError(f"layer {i} is not of {units} units")
        if units < 1 or not steps > trace.warm[i] >= 0:
            raise ValueError(f"layer {i} has no steps")
