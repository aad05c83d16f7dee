"""LoRA adapters, as `mlx_lm.lora` trains them, on a model whose FFNs are on flash.

An adapter's own weights stay in memory. Those of an FFN on flash work where its neurons
lie in the checkpoint's order, each of them with its part of the adapter.
"""

from dataclasses import dataclass
from pathlib import Path

from mlx_lm.tuner.utils import load_adapters

from .arrays import parameters
from .assembly import Assembled
from .errors import FlashError, reason_of
from .layers.kinds import EXPERT
from .storage.digests import file_sha256
from .storage.files import read_json
from .storage.safetensors import read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
FUSE = "Fuse it into the model (mlx_lm.fuse) and convert that."


@dataclass(frozen=True)
class Adapter:
    """An adapter that was applied.

    Attributes:
        sha256: Of its weights.
        nbytes: What they take.
    """

    sha256: str
    nbytes: int


def apply_adapter(path: str | Path, parts: Assembled) -> Adapter:
    """Put an adapter into a model whose weights have not been read.

    Args:
        path: The folder that `mlx_lm.lora` wrote.

    Raises:
        FlashError: If there is none, if it does not fit the model, or if it changes
            weights that are on flash in a way that needs them.
    """
    folder = _find(path)
    config = read_json(folder / CONFIG)
    kind = config.get("fine_tune_type", "lora") if isinstance(config, dict) else None
    if kind not in ("lora", "dora", "full"):
        raise FlashError(f"{folder / CONFIG} is damaged. Train the adapter again.")
    _check_streamed(folder, parts, kind)
    before = _nbytes(parts)
    try:
        load_adapters(parts.model, str(folder))
    # mlx-lm's and MLX's, of settings that are missing and of shapes that do not fit.
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(reason_of(error).split())
        raise FlashError(
            f"{folder} does not fit this model: {reason}. Name an adapter that was "
            "trained on it."
        ) from error
    parts.model.eval()
    return Adapter(file_sha256(folder / WEIGHTS), _nbytes(parts) - before)


def adapter_digest(path: str | Path) -> str:
    """A digest of all that decides what an adapter does.

    Raises:
        FlashError: If there is none.
    """
    folder = _find(path)
    return file_sha256(folder / CONFIG) + file_sha256(folder / WEIGHTS)


def _find(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FlashError(
                f"{folder} has no {name}, so it is no adapter. Name the folder that "
                "mlx_lm.lora wrote."
            )
    return folder


def _nbytes(parts: Assembled) -> int:
    return sum(array.nbytes for array in parameters(parts.model).values())


def _check_streamed(folder: Path, parts: Assembled, kind: str) -> None:
    """Refuse an adapter of what is on flash that cannot be taken to its units."""
    names, _ = read_header(folder / WEIGHTS)
    manifest = parts.manifest
    for entry in manifest.layers + manifest.beside:
        if not any(name.startswith(f"{entry.module}.") for name in names):
            continue
        reason = None
        if kind != "lora":
            reason = f"as {kind}, which needs the weights themselves"
        elif entry in manifest.tables:
            reason = "whose embeddings are on flash"
        elif parts.kind is EXPERT and entry in manifest.layers:
            reason = "whose experts are on flash"
        elif entry.order != "checkpoint":
            reason = "whose neurons lie in another order on flash"
        if reason:
            raise FlashError(
                f"The adapter {folder} changes {entry.module}, {reason}. {FUSE}"
            )
