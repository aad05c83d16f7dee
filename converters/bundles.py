"""Write one layer's bundles: any parts, side by side, unit after unit.

Bundles are given as bytes by a `Bundles`: those of a checkpoint's FFN are laid out as
they are asked for (`CutBundles`), those of a flash folder lie in its file already
(`StoredBundles`).
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import FlashError, reason_of
from ..storage.digests import sample_sha256
from ..storage.layout import lay_out
from ..storage.limits import LARGE_PAGE_BYTES, PAGE_BYTES
from ..storage.manifest import BUNDLES, Layer, Part
from ..storage.safetensors import (
    Tensor,
    header_bytes,
    read_header,
    write_safetensors,
)

WRITE_BYTES = 32_000_000  # gathered for one write
SAMPLE = 8  # units of each layer that are read back and compared


class Bundles:
    """The bundles of a whole layer.

    Attributes:
        units: How many there are.
        unit_bytes: From one to the next.
        parts: What each holds.
    """

    units: int
    unit_bytes: int
    parts: tuple[Part, ...]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The bytes of some that lie side by side: uint8 [stop - start, unit_bytes]."""
        raise NotImplementedError

    def gather(self, units: np.ndarray) -> Iterator[np.ndarray]:
        """The bytes of these units, sorted numbers, in pieces that memory can hold."""
        step = max(WRITE_BYTES // self.unit_bytes, 1)
        for first in range(0, len(units), step):
            wanted = units[first : first + step]
            ends = np.flatnonzero(np.diff(wanted) != 1) + 1
            runs = np.split(wanted, ends)
            pieces = [self.rows(run[0], run[-1] + 1) for run in runs]
            yield np.concatenate(pieces) if len(pieces) > 1 else pieces[0]


class CutBundles(Bundles):
    """Bundles that are laid out from the parts of all units.

    Args:
        parts: Each part of all units, [units, …], of any dtype.
    """

    def __init__(self, parts: dict[str, mx.array]):
        self.units = len(next(iter(parts.values())))
        self.parts = lay_out(parts)
        self.unit_bytes = _padded(sum(part.bytes for part in self.parts))
        self._arrays = list(parts.values())

    def rows(self, start: int, stop: int) -> np.ndarray:
        out = np.zeros((stop - start, self.unit_bytes), np.uint8)
        for part, array in zip(self.parts, self._arrays, strict=True):
            piece = mx.contiguous(array[int(start) : int(stop)])
            end = part.offset + part.bytes
            raw = np.asarray(piece.reshape(-1).view(mx.uint8))
            out[:, part.offset : end] = raw.reshape(stop - start, -1)
        return out


class StoredBundles(Bundles):
    """Bundles as a flash folder has them.

    Args:
        path: The layer's file.
        layer: Of the manifest.
    """

    def __init__(self, path: Path, layer: Layer):
        self.units = layer.units
        self.unit_bytes = layer.unit_bytes
        self.parts = layer.parts
        self._path = path
        self._data_offset = layer.data_offset

    def rows(self, start: int, stop: int) -> np.ndarray:
        first = self._data_offset + int(start) * self.unit_bytes
        wanted = int(stop - start) * self.unit_bytes
        try:
            with open(self._path, "rb") as file:
                file.seek(first)
                found = file.read(wanted)
        except OSError as error:
            raise FlashError(
                f"{self._path} cannot be read: {reason_of(error)}."
            ) from error
        if len(found) != wanted:
            raise FlashError(f"{self._path} became shorter while it was split.")
        return np.frombuffer(found, np.uint8).reshape(-1, self.unit_bytes)


def write_bundles(
    path: Path,
    module: str,
    parts: dict[str, mx.array] | Bundles,
    owned: np.ndarray | None = None,
) -> Layer:
    """Write one layer's file, read some units back, and describe it.

    Args:
        path: The file, in the flash folder's `ffn`.
        module: Path of the FFN in the model's module tree.
        parts: Each part of all units, [units, …], of any dtype; or all bundles.
        owned: The units to write, sorted; without it, all of them.

    Raises:
        FlashError: If the disk is full, or gives back other bytes than it was given.
    """
    bundles = parts if isinstance(parts, Bundles) else CutBundles(parts)
    units = np.arange(bundles.units) if owned is None else owned
    shape = (len(units), bundles.unit_bytes)
    tensor = Tensor("uint8", shape, lambda: (p.data for p in bundles.gather(units)))
    sha256 = write_safetensors(path, {BUNDLES: tensor}, LARGE_PAGE_BYTES)
    _, data_offset = read_header(path)
    with open(path, "rb") as file:
        for row in np.linspace(0, len(units) - 1, SAMPLE).astype(int).tolist():
            file.seek(data_offset + row * bundles.unit_bytes)
            unit = int(units[row])
            wanted = bundles.rows(unit, unit + 1).tobytes()
            if file.read(bundles.unit_bytes) != wanted:
                raise FlashError(
                    f"{path}: unit {row} reads back differently from what was "
                    "written. The disk is failing, or something else writes there."
                )
    return Layer(
        module=module,
        file=f"{path.parent.name}/{path.name}",
        sha256=sha256,
        data_offset=data_offset,
        units=len(units),
        unit_bytes=bundles.unit_bytes,
        parts=bundles.parts,
        order="checkpoint",
        predictor=None,
        sample=sample_sha256(path),
    )


def whole_sha256(bundles: Bundles) -> str:
    """SHA-256 of the file that would hold all of these bundles; none is written."""
    tensor = Tensor("uint8", (bundles.units, bundles.unit_bytes), lambda: ())
    digest = hashlib.sha256(header_bytes({BUNDLES: tensor}, LARGE_PAGE_BYTES))
    for piece in bundles.gather(np.arange(bundles.units)):
        digest.update(piece.data)
    return digest.hexdigest()


def _padded(nbytes: int) -> int:
    """Round up to whole blocks where that costs little: no bundle then shares one."""
    whole = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
    return whole if whole - nbytes <= nbytes // 16 else nbytes
