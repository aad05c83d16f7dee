"""PyTorch's pickled checkpoints, read safely and rewritten as safetensors.

`weights_only=True` runs no code from the file, `mmap=True` keeps it out of memory.
"""

import pickle
import warnings
import zipfile
from pathlib import Path

from ..errors import FlashError
from ..storage.safetensors import Tensor, write_safetensors


def to_safetensors(file: Path, target: Path) -> str:
    """Rewrite one .bin file as `target`, tensor by tensor, and return its SHA-256.

    Raises:
        FlashError: If PyTorch is not installed, or the file is damaged or holds more
            than tensors.
    """
    try:
        import torch  # type: ignore[import-not-found]  # an extra
    except ImportError:
        raise FlashError(
            f"{file} is a PyTorch file, which needs PyTorch to be read: "
            "pip install torch. Checkpoints in safetensors need nothing."
        ) from None
    mapped = zipfile.is_zipfile(file)  # PyTorch before 1.6 wrote no zip files
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickles, refused anyway
            weights = torch.load(file, "cpu", weights_only=True, mmap=mapped)
        if not all(isinstance(w, torch.Tensor) for w in weights.values()):
            raise ValueError("it holds other things")
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        AttributeError,
        LookupError,
        EOFError,
        OSError,
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FlashError(
            f"{file} cannot be read as a PyTorch checkpoint of plain tensors "
            f"({reason}). Download it again."
        ) from error
    known = {torch.float32: "float32", torch.float16: "float16"}
    known[torch.bfloat16] = "bfloat16"

    def entry(tensor) -> Tensor:
        def chunks():
            yield tensor.contiguous().flatten().view(torch.uint8).numpy().data

        return Tensor(known[tensor.dtype], tuple(tensor.shape), chunks)

    # Integer buffers (a causal mask, say) are no weights.
    kept = {k: entry(t) for k, t in weights.items() if t.dtype in known}
    return write_safetensors(target, kept)
