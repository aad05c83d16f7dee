"""PyTorch's pickled checkpoints, read safely and rewritten as safetensors.

`weights_only=True` runs no code from the file, `mmap=True` keeps it out of memory.
"""

import pickle
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import FlashError
from ..storage.safetensors import Tensor, write_safetensors

# Before, a file could run code in spite of `weights_only`: CVE-2025-32434 until 2.5,
# CVE-2026-24747 until 2.9.
SAFE_FROM = (2, 10)
DTYPES = ("float32", "float16", "bfloat16")


def to_safetensors(file: Path, target: Path) -> str:
    """Rewrite one .bin file as `target`, tensor by tensor, and return its SHA-256.

    Raises:
        FlashError: If PyTorch is not installed or too old to read a stranger's file,
            or the file is damaged or holds more than plain tensors.
    """
    try:
        import torch  # type: ignore[import-not-found]  # an extra
    except ImportError:
        raise FlashError(
            f"{file} is a PyTorch file, which needs PyTorch to be read: "
            "pip install 'torch>=2.10'. Checkpoints in safetensors need nothing."
        ) from None
    version = torch.__version__.split("+")[0].split(".")
    if (int(version[0]), int(version[1])) < SAFE_FROM:
        raise FlashError(
            f"{file} could run code in PyTorch {torch.__version__} (CVE-2026-24747). "
            "Get one that is repaired: pip install 'torch>=2.10'."
        )
    weights = _load(torch, file)
    return write_safetensors(target, _plain(torch, file, weights))


def _load(torch: ModuleType, file: Path) -> dict[Any, Any]:
    """The tensors of a file, which stay on disk where its format allows that."""
    try:
        mapped = zipfile.is_zipfile(file)  # PyTorch before 1.6 wrote no zip files
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickles, refused anyway
            weights = torch.load(file, "cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:  # its text names ways to run the code
        raise _refused(file, "it is damaged, or holds more than tensors") from error
    except Exception as error:  # whatever its reader stumbles over in a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise _refused(file, reason) from error
    if not isinstance(weights, dict):
        raise _refused(file, "it holds other things")
    return weights


def _plain(torch: ModuleType, file: Path, weights: dict[Any, Any]) -> dict[str, Tensor]:
    """What is written of the file's tensors; whole numbers are masks, and no weights.

    A tensor may take no more memory than its part of the file has bytes.
    """
    known = {getattr(torch, name): name for name in DTYPES}
    kept = {}
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise _refused(file, "it holds other things")
        on_cpu = tensor.device.type == "cpu" and tensor.layout is torch.strided
        if tensor.is_nested or tensor.is_quantized or not on_cpu:
            raise _refused(file, f"{name} is no plain tensor")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise _refused(file, f"{name} is larger than its values")
        if tensor.dtype in known:
            kept[name] = _entry(torch, tensor, known[tensor.dtype])
        elif tensor.is_floating_point() or tensor.is_complex():
            kind = f"{tensor.dtype}, and weights are {', '.join(DTYPES)}"
            raise _refused(file, f"{name} is {kind}")
    return kept


def _entry(torch: ModuleType, tensor: Any, dtype: str) -> Tensor:
    def chunks() -> Iterator[memoryview]:
        yield tensor.contiguous().flatten().view(torch.uint8).numpy().data

    return Tensor(dtype, tuple(tensor.shape), chunks)


def _refused(file: Path, reason: str) -> FlashError:
    return FlashError(
        f"{file} cannot be read as a PyTorch checkpoint of plain tensors ({reason}). "
        "Download it again, or another one."
    )
