"""Write one layer's bundles: any parts, side by side, unit after unit."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import FlashError
from ..storage.digests import sample_sha256
from ..storage.layout import lay_out
from ..storage.limits import LARGE_PAGE_BYTES, PAGE_BYTES
from ..storage.manifest import BUNDLES, Layer
from ..storage.safetensors import Tensor, read_header, write_safetensors

WRITE_BYTES = 32_000_000  # gathered for one write
SAMPLE = 8  # units of each layer that are read back and compared


def write_bundles(path: Path, module: str, parts: dict[str, mx.array]) -> Layer:
    """Write one layer's file, read some units back, and describe it.

    Args:
        path: The file, in the flash folder's `ffn`.
        module: Path of the FFN in the model's module tree.
        parts: Each part of all units, [units, …], of any dtype.

    Raises:
        FlashError: If the disk is full, or gives back other bytes than it was given.
    """
    units = len(next(iter(parts.values())))
    layout = lay_out(parts)
    unit_bytes = _padded(sum(part.bytes for part in layout))

    def rows(start: int, stop: int) -> np.ndarray:
        out = np.zeros((stop - start, unit_bytes), np.uint8)
        for part, array in zip(layout, parts.values(), strict=True):
            piece = mx.contiguous(array[start:stop]).reshape(-1).view(mx.uint8)
            end = part.offset + part.bytes
            out[:, part.offset : end] = np.asarray(piece).reshape(stop - start, -1)
        return out

    def chunks() -> Iterator[memoryview]:
        step = max(WRITE_BYTES // unit_bytes, 1)
        for start in range(0, units, step):
            yield rows(start, min(start + step, units)).data

    bundles = Tensor("uint8", (units, unit_bytes), chunks)
    sha256 = write_safetensors(path, {BUNDLES: bundles}, LARGE_PAGE_BYTES)
    _, data_offset = read_header(path)
    with open(path, "rb") as file:
        for unit in np.linspace(0, units - 1, SAMPLE).astype(int).tolist():
            file.seek(data_offset + unit * unit_bytes)
            if file.read(unit_bytes) != rows(unit, unit + 1).tobytes():
                raise FlashError(
                    f"{path}: unit {unit} reads back differently from what was "
                    "written. The disk is failing, or something else writes there."
                )
    return Layer(
        module=module,
        file=f"{path.parent.name}/{path.name}",
        sha256=sha256,
        data_offset=data_offset,
        units=units,
        unit_bytes=unit_bytes,
        parts=layout,
        order="checkpoint",
        predictor=None,
        sample=sample_sha256(path),
    )


def _padded(nbytes: int) -> int:
    """Round up to whole blocks where that costs little: no bundle then shares one."""
    whole = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
    return whole if whole - nbytes <= nbytes // 16 else nbytes
