"""Load a flash folder into a model that mlx-lm's own functions accept.

The model is mlx-lm's (or ours in its style); only its FFN modules are exchanged for
`NeuronFFN`, which reads what it needs while it runs. `model.flash` is the handle on
everything that an ordinary model does not have: figures, budget, files, `close`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .budget import Budget, make_budget
from .cache import Lru, Window
from .errors import FlashError
from .format import MANIFEST, Manifest, read_manifest
from .hub import find_model
from .layers import ACTIVATIONS, CLOSED, NeuronFFN
from .models import get_model_classes, make_model, read_config
from .reader import open_reader
from .slots import UnitSlots
from .stats import Stats

DEMO_MODEL = Path(__file__).parent / "demo_model"
DEFAULT_CONTEXT = 2048
READ_THREADS = 32  # the queue depth at which Apple's and other SSDs give most


class Flash:
    """What a loaded model has on flash: `stats`, `budget`, `manifest`, `close()`."""

    def __init__(self, folder, manifest, budget, reader, layers, positions):
        self.folder: Path = folder
        self.manifest: Manifest = manifest
        self.budget: Budget = budget
        self.layers: list[NeuronFFN] = layers
        self.positions: int | None = positions
        self.stats = Stats()
        self.run = None  # of the last generation, see generation.Run
        self.closed = False
        self._reader = reader

    @property
    def direct_io(self) -> bool:
        """Whether reads go past the operating system's page cache."""
        return self._reader.direct

    def close(self) -> None:
        """End the reader's threads, close its files, let go of the slots."""
        self.closed = True
        self._reader.close()
        for layer in self.layers:
            layer.store = None

    def check_open(self) -> None:
        """Raise a FlashError if the model was closed."""
        if self.closed:
            raise FlashError(CLOSED)


class Loaded(tuple):
    """What `load` returns: unpack it, or use it in `with` to close it at the end."""

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self[0].flash.close()


def load(path: str | Path, memory: int | str = "auto", **options) -> Loaded:
    """Load a flash folder and its tokenizer.

    >>> with mlx_flash.load("opt-6.7b-flash", memory="7GB") as (model, tokenizer):
    ...     print(mlx_lm.generate(model, tokenizer, "Once upon a time"))

    Args:
        path: A folder that `mlx-flash convert` wrote, or a hub name of one.
        memory: All that the model may hold: bytes, "7GB", "50%" of it, or "auto".
        options: As for `load_model`.

    Returns:
        (model, tokenizer), a tuple that is also a context manager.

    Raises:
        FlashError: As `load_model`, and if the folder has no tokenizer.
    """
    folder = find_model(path)
    tokenizer = load_tokenizer(folder)
    model, _ = load_model(folder, memory, **options)
    return Loaded((model, tokenizer))


def load_tokenizer(folder: Path):
    """The folder's tokenizer in mlx-lm's wrapper.

    Raises:
        FlashError: If there is none or it cannot be read.
    """
    from mlx_lm.utils import load_tokenizer as load_wrapped

    config = read_config(folder)
    try:
        # transformers makes an empty tokenizer of a folder that has none.
        if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
            raise ValueError("no tokenizer* or vocab* file")
        return load_wrapped(folder, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # whatever transformers raises for a broken tokenizer
        reason = str(error).strip().splitlines()[0] if str(error).strip() else error
        raise FlashError(
            f"{folder} has no usable tokenizer ({reason}). Copy the files of the "
            "original checkpoint (tokenizer.json, tokenizer_config.json, …) into it."
        ) from error


def load_model(
    path: str | Path,
    memory: int | str = "auto",
    *,
    predictor: bool = True,
    policy: str | Lru | Window = "lru",
    window: int = 4,
    context: int | None = None,
    page_cache: bool = False,
    native: bool | None = None,
) -> Loaded:
    """Load a flash folder without its tokenizer.

    Args:
        path: A folder that `mlx-flash convert` wrote, or a hub name of one.
        memory: All that the model may hold: bytes, "7GB", "50%" of it, or "auto".
        predictor: False computes every neuron of every token: exact, and slow.
        policy: "lru", "window" (the paper's: what the last tokens used), or an object
            with their method.
        window: Tokens the window policy keeps (the paper: 4).
        context: Tokens for which the budget reserves KV cache (default: 2048 or the
            model's positions).
        page_cache: Leave the operating system's cache on for reads.
        native: True insists on the C reader, False takes the Python one.

    Returns:
        (model, config); `model.flash` is a `Flash`.

    Raises:
        FlashError: If the folder is missing, damaged or newer, or does not fit.
    """
    folder = find_model(path)
    manifest = read_manifest(folder)
    config = read_config(folder)
    model_class, args_class = get_model_classes(config)
    model = make_model(model_class, args_class, config, folder)
    policy = _policy(policy, window)
    positions = config.get("max_position_embeddings")
    context = context or min(DEFAULT_CONTEXT, positions or DEFAULT_CONTEXT)
    budget = make_budget(memory, manifest, config, context, folder)

    layers = _exchange_ffns(model, manifest, predictor, folder)
    _load_resident(model, manifest, predictor, folder)
    reader = open_reader(READ_THREADS, direct=not page_cache, native=native)
    flash = Flash(folder, manifest, budget, reader, layers, positions)
    try:
        for layer, entry, n_slots in zip(
            layers, manifest.layers, budget.slots, strict=True
        ):
            layer.store = UnitSlots(entry, folder, n_slots, policy, reader, flash.stats)
            if layer.store.holds_all:
                layer.store.read_all()
    except BaseException:
        flash.close()
        raise
    if not (reader.direct or page_cache):
        print(
            f"{folder} lies on a file system without direct I/O: reading through the "
            "page cache, so timings are not those of the disk.",
            file=sys.stderr,
        )
    flash.stats.reset()
    model.flash = flash
    return Loaded((model, config))


def _policy(policy, window: int):
    if policy == "lru":
        return Lru()
    if policy == "window":
        return Window(window)
    if isinstance(policy, str):
        raise FlashError(f"No policy is called {policy!r}. Try lru or window.")
    return policy


def _exchange_ffns(
    model: nn.Module, manifest: Manifest, predictor: bool, folder: Path
) -> list[NeuronFFN]:
    if manifest.activation not in ACTIVATIONS:
        raise FlashError(
            f"{folder / MANIFEST}: unknown activation {manifest.activation!r}."
        )
    modules = dict(model.named_modules())
    layers = []
    for entry in manifest.layers:
        old = modules.get(entry.module)
        if old is None:
            raise FlashError(
                f"{folder}: the manifest exchanges {entry.module}, which a model of "
                f"type {manifest.model_type!r} does not have. Convert it again."
            )
        matrices = [v for _, v in tree_flatten(old.parameters()) if v.ndim == 2]
        dims = sum(m.size for m in matrices) // (2 * entry.units)
        parts = [(p.name, p.dtype, p.shape) for p in entry.parts]
        dtype = manifest.dtype
        if parts != [("up", dtype, (dims,)), ("down", dtype, (dims,))]:
            raise FlashError(
                f"{folder}: bundles of {entry.module} hold {parts}, its config.json "
                f"asks for up and down of {dims} values, {MANIFEST} for {dtype}. "
                "Convert the model again."
            )
        rank = entry.predictor.rank if predictor and entry.predictor else 0
        bias = any("bias" in name for name, _ in tree_flatten(old.parameters()))
        layers.append(NeuronFFN(dims, entry.units, manifest.activation, bias, rank))
    names = [entry.module for entry in manifest.layers]
    model.update_modules(tree_unflatten(list(zip(names, layers, strict=True))))
    return layers


def _load_resident(
    model: nn.Module, manifest: Manifest, predictor: bool, folder: Path
) -> None:
    weights = _load_file(folder / manifest.resident.file)
    if predictor and manifest.predictors:
        weights |= _load_file(folder / manifest.predictors.file)
    try:
        model.load_weights(list(weights.items()), strict=True)
    except ValueError as error:
        raise FlashError(
            f"{folder}: its weights do not fit its config.json "
            f"({str(error).splitlines()[0]}). Convert the model again."
        ) from error
    model.eval()
    mx.eval(model.parameters())


def _load_file(path: Path) -> dict[str, mx.array]:
    try:
        return mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FlashError(f"{path} cannot be read: {reason}.") from error
