"""Load a flash folder into a model that mlx-lm's own functions accept.

The model is mlx-lm's (or ours in its style); only its FFN modules are exchanged for
ones that read what they need while they run. `model.flash` is the handle on
everything that an ordinary model does not have: figures, budget, files, `close`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx

from .assembly import assemble, can_stream
from .checkpoints.config import read_config
from .checkpoints.hub import find_model
from .errors import FlashError
from .memory.budget import Budget, make_budget
from .memory.policies import Lrfu, Lru, Window
from .memory.slots import CLOSED, UnitSlots
from .memory.stats import Stats
from .storage.limits import PAGE_BYTES
from .storage.manifest import Manifest
from .storage.reader import open_reader
from .traces.curves import by_trace

DEMO_MODEL = Path(__file__).parent / "demo_model"
DEFAULT_CONTEXT = 2048
READ_THREADS = 32  # the queue depth at which Apple's and other SSDs give most
# Read over such a gap: of 0 to 32 KiB the fastest for 1 KiB bundles, in any order.
GAP_BYTES = PAGE_BYTES


class Flash:
    """What a loaded model has on flash: `stats`, `budget`, `manifest`, `close()`."""

    def __init__(self, folder, manifest, budget, reader, layers, positions):
        self.folder: Path = folder
        self.manifest: Manifest = manifest
        self.budget: Budget = budget
        self.layers: list = layers
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
    folder = find_model(path, checkpoint=can_stream)
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
    policy: str | Lru = "auto",
    window: int = 4,
    context: int | None = None,
    overlap: bool = True,
    look_ahead: bool = False,
    page_cache: bool = False,
    native: bool | None = None,
    trace: str | Path | None = None,
) -> Loaded:
    """Load a flash folder without its tokenizer.

    Args:
        path: A folder that `mlx-flash convert` wrote, or a hub name of one.
        memory: All that the model may hold: bytes, "7GB", "50%" of it, or "auto".
        predictor: False computes every neuron of every token: exact, and slow.
        policy: What stays in memory: "lru", "lrfu" (what was used often and lately),
            "window" (the paper's: what the last tokens used), or an object of such a
            class. "auto" is lrfu for neurons, which hit 3 to 5 points more with it on
            the demo model, and lru for the rest.
        window: Tokens the window policy keeps (the paper: 4).
        context: Tokens for which the budget reserves KV cache (default: 2048 or the
            model's positions).
        overlap: Read what a layer lacks while MLX multiplies what is there.
        look_ahead: Read also what the next layer will probably need, judged by this
            layer's input.
        page_cache: Leave the operating system's cache on for reads.
        native: True insists on the C reader, False takes the Python one.
        trace: A file of `mlx-flash trace`: layers get slots by the hits that they
            would have had on it, instead of the same share each.

    Returns:
        (model, config); `model.flash` is a `Flash`.

    Raises:
        FlashError: If the folder is missing, damaged or newer, or does not fit.
    """
    folder = find_model(path, checkpoint=can_stream)
    parts = assemble(folder, predictor)
    model, config, manifest = parts.model, parts.config, parts.manifest
    policy = _policy(policy, window, manifest.unit)
    positions = config.get("max_position_embeddings")
    context = context or min(DEFAULT_CONTEXT, positions or DEFAULT_CONTEXT)
    facts = memory, manifest, parts.shapes, context, folder
    if trace is not None:
        facts = *facts, by_trace(Path(trace), manifest, policy)
    budget = make_budget(*facts)

    mx.reset_peak_memory()
    mx.eval(model.parameters())
    reader = open_reader(
        READ_THREADS, direct=not page_cache, native=native, max_gap_bytes=GAP_BYTES
    )
    flash = Flash(folder, manifest, budget, reader, parts.layers, positions)
    try:
        for i, layer in enumerate(parts.layers):
            layer.store = UnitSlots(
                manifest.layers[i],
                folder,
                budget.slots[i],
                policy,
                reader,
                flash.stats,
                parts.extents[i] if parts.extents else None,
                layer.apart if overlap else 0.0,
            )
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
    if look_ahead:
        parts.look_ahead()
    flash.stats.reset()
    model.flash = flash
    return Loaded((model, config))


def _policy(policy, window: int, unit: str):
    if policy == "auto":
        policy = "lrfu" if unit == "neuron" else "lru"
    if policy == "lru":
        return Lru()
    if policy == "lrfu":
        return Lrfu()
    if policy == "window":
        if window < 1:
            raise FlashError(f"A window of {window} tokens keeps nothing. Try 4.")
        return Window(window)
    if isinstance(policy, str):
        raise FlashError(f"No policy is called {policy!r}. Try lru, lrfu or window.")
    return policy
