"""Write safetensors files tensor by tensor, so that no file has to fit in memory.

The library's own writer wants every tensor at once; a flash folder is written while
one layer is in memory. Reading is left to `mx.load` and to any other tool: the files
are plain safetensors (8 bytes of little-endian header length, a JSON header, data).
"""

import errno
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..errors import FlashError
from .files import MAX_JSON_BYTES, file_bytes, to_disk

# Names as MLX and the manifest spell them, with the safetensors code and the size.
DTYPES = {
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "uint32": ("U32", 4),
    "int32": ("I32", 4),
    "uint8": ("U8", 1),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: `chunks()` yields its bytes, in order, when asked."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype][1]


def write_safetensors(
    path: Path, tensors: dict[str, Tensor], align_bytes: int = 8
) -> str:
    """Write `tensors` to `path`, whole or not at all.

    The bytes go to `<path>.part`, which takes the final name once it is on disk.

    Args:
        path: The final name.
        tensors: What to write, in this order.
        align_bytes: The data starts on a multiple of it (the header is padded
            with spaces, which the format allows).

    Returns:
        The SHA-256 of the file, as hexadecimal text.

    Raises:
        FlashError: If the disk is full or cannot be written; nothing is left behind.
    """
    part = path.with_name(path.name + ".part")
    digest = hashlib.sha256()
    try:
        with open(part, "wb") as out:

            def put(data) -> None:
                digest.update(data)
                out.write(data)

            put(header_bytes(tensors, align_bytes))
            for name, tensor in tensors.items():
                before = out.tell()
                for chunk in tensor.chunks():
                    put(chunk)
                written = out.tell() - before
                if written != tensor.nbytes:
                    raise ValueError(f"{name}: {written} of {tensor.nbytes} bytes")
            out.flush()
            to_disk(out.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise write_error(path, error) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def write_error(path: Path, error: OSError) -> FlashError:
    """The one line for a write that the system refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FlashError(
            f"The disk is full: {path} could not be written. Free some space or choose "
            "another folder, then run the same command again: finished layers are kept."
        )
    return FlashError(f"{path} could not be written: {error.strerror or error}.")


def header_bytes(tensors: dict[str, Tensor], align_bytes: int) -> bytes:
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": DTYPES[tensor.dtype][0],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align_bytes)
    return struct.pack("<Q", len(text)) + text


def read_header(path: Path) -> tuple[dict, int]:
    """The header of a safetensors file and the offset in bytes where its data starts.

    Every length is held against the file's size before it is used.

    Raises:
        FlashError: If the file is missing, cut short or its header lies.
    """
    header, offset = _read_header(path)
    header.pop("__metadata__", None)
    return header, offset


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; its header is judged as a whole.

    Raises:
        FlashError: As `read_header`.
    """
    found = _read_header(path)[0].get("__metadata__", {})
    if not isinstance(found, dict):
        raise FlashError(f"{path} has a damaged safetensors header.")
    return {name: text for name, text in found.items() if isinstance(text, str)}


def _read_header(path: Path) -> tuple[dict, int]:
    try:
        size = file_bytes(path)
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 < length <= min(MAX_JSON_BYTES, size - 8):
                raise FlashError(f"{path} is not a whole safetensors file.")
            header = json.loads(file.read(length))
    except OSError as error:
        raise FlashError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # not JSON or not UTF-8
        raise FlashError(f"{path} has a damaged safetensors header.") from error
    if not isinstance(header, dict):
        raise FlashError(f"{path} has a damaged safetensors header.")
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not _sound(entry):
            raise FlashError(f"{path}: the header's entry for {name} is damaged.")
        end = max(end, entry["data_offsets"][1])
    if 8 + length + end != size:
        raise FlashError(
            f"{path} has {size:,} bytes, its header speaks of {8 + length + end:,}: "
            "it was cut short or altered. Download or convert it again."
        )
    return header, 8 + length


def _sound(entry) -> bool:
    """Whether offsets are in order and, for a dtype we know, agree with the shape."""
    try:
        first, last = entry["data_offsets"]
        dtype, shape = entry["dtype"], entry["shape"]
        if not all(type(n) is int and n >= 0 for n in (first, last, *shape)):
            return False
        size = dict(DTYPES.values()).get(dtype)  # other dtypes are not judged
        return first <= last and (not size or prod(shape) * size == last - first)
    except (TypeError, KeyError, ValueError):
        return False
