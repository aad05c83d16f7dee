"""Load a flash folder into a model that mlx-lm's own functions accept.

The model is mlx-lm's (or ours in its style); only its FFN modules are exchanged for
ones that read what they need while they run. `model.flash` is the handle on
everything that an ordinary model does not have: figures, budget, files, `close`.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from .assembly import Assembled, assemble, can_stream
from .checkpoints.hub import find_model
from .checkpoints.record import check_files
from .checkpoints.tokenizer import check_vocabulary, load_tokenizer
from .chunks import in_chunks
from .draft_model import DraftModel, open_draft
from .errors import FlashError, NotEnoughMemory, reason_of
from .flash import Flash, Loaded
from .layers.kinds import UnitKind
from .memory.budget import LEAST_CONTEXT, Budget, make_budget, total_bytes
from .memory.divide import Divide
from .memory.footprint import Footprint
from .memory.page_cache import use_page_cache
from .memory.policies import Lrfu, Lru, Window
from .memory.pool import Pool
from .memory.slots import UnitSlots
from .memory.system import check_gpu_memory
from .memory.whole import LOCALITY, asks_of, divide_by, kind_rewards
from .memory_size import LEAST_BARE, say_memory
from .storage.direct_io import cached_before
from .storage.limits import PAGE_BYTES
from .storage.open_files import allow_open_files
from .storage.reader import open_reader
from .traces.curves import by_trace

DEFAULT_CONTEXT = 2048
READ_THREADS = 32  # the queue depth at which Apple's and other SSDs give most
# Read over such a gap: of 0 to 32 KiB the fastest for 1 KiB bundles, in any order.
GAP_BYTES = PAGE_BYTES


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        predictor: False computes every neuron of every token: exact, and slow.
        policy: What stays in memory: "lru", "lrfu" (what was used often and lately),
            "window" (the paper's: what the last tokens used), or an object of such a
            class. "auto" is what suits the unit kind.
        window: Tokens the window policy keeps (the paper: 4).
        context: Tokens for which the budget reserves KV cache (default: 2048 or the
            model's positions, fewer where memory is short).
        overlap: Read what a layer lacks while MLX multiplies what is there.
        look_ahead: Read also what the next layer will probably need, judged by this
            layer's input.
        page_cache: Let the operating system cache what is read: "on" or True, "off" or
            False, or "auto": where memory beyond the budget can hold enough.
        native: True insists on the C reader, False takes the Python one.
        elastic: Hold less memory while other programs need it, and take it back when
            they do not. None does so where memory is "auto".
        trace: A file of `mlx-flash trace`: layers get slots by the hits that they
            would have had on it. Without, each gets the same share, but for layers
            that are held whole where waiting for the GPU costs more (`memory.whole`).
        check: What is held against the digests that were noted of the model's files:
            "sample" takes configuration, tokenizer and some pieces of each file of
            weights, "full" every byte, "none" nothing.
        draft_model: A checkpoint, by folder or hub name, that is kept in memory and
            drafts tokens for `mlx_flash.stream_generate`. What it takes is taken from
            `memory`.
    """

    predictor: bool = True
    policy: str | Lru = "auto"
    window: int = 4
    context: int | None = None
    overlap: bool = True
    look_ahead: bool = False
    page_cache: bool | str = "auto"
    native: bool | None = None
    elastic: bool | None = None
    trace: str | Path | None = None
    check: str = "sample"
    draft_model: str | Path | None = None


def load(
    path: str | Path,
    memory: int | str = "auto",
    trust_remote_code: bool = False,
    **options: Any,
) -> Loaded:
    """Load a flash folder and its tokenizer.

    >>> with mlx_flash.load("opt-6.7b-flash", memory="7GB") as (model, tokenizer):
    ...     print(mlx_lm.generate(model, tokenizer, "Once upon a time"))

    Args:
        path: A folder that `mlx-flash convert` wrote, or a hub name of one.
        memory: All that the model may hold: bytes, "7GB", "50%" of it, or "auto".
        trust_remote_code: Whether the tokenizer may be code that the folder brings.
        options: As `LoadOptions` describes them.

    Returns:
        (model, tokenizer), a tuple that is also a context manager.

    Raises:
        FlashError: As `load_model`, and if the folder has no tokenizer, or another
            model's.
    """
    folder = find_model(path, checkpoint=can_stream)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    model, _ = load_model(folder, memory, **options)
    try:
        check_vocabulary(tokenizer, folder, model.flash.vocabulary)
    except BaseException:
        model.flash.close()
        raise
    return Loaded((model, tokenizer))


def load_model(path: str | Path, memory: int | str = "auto", **options: Any) -> Loaded:
    """Load a flash folder without its tokenizer.

    Args:
        path: A folder that `mlx-flash convert` wrote, or a hub name of one.
        memory: All that the model may hold: bytes, "7GB", "50%" of it, or "auto".
        options: As `LoadOptions` describes them.

    Returns:
        (model, config); `model.flash` is a `Flash`.

    Raises:
        FlashError: If the folder is missing, damaged, altered or newer, or does not
            fit.
    """
    wanted = LoadOptions(**options)
    folder = find_model(path, checkpoint=can_stream)
    allow_open_files(len(list(folder.rglob("*.safetensors"))))
    parts = assemble(folder, wanted.predictor)
    # Before weights are read, and after what says more than that a file differs.
    check_files(folder, wanted.check)
    policy = _policy(wanted, parts.kind)
    footprint, divide = _needs(parts, policy, wanted)
    least_context = None if wanted.context else LEAST_CONTEXT
    draft = None
    if wanted.draft_model is not None:
        draft = open_draft(wanted.draft_model, folder, footprint.context)
    budget = _budget(memory, draft, footprint, folder, divide, least_context)
    # Who gives more than the model can use, does no harm with it.
    taken = draft.nbytes if draft else 0
    check_gpu_memory(min(budget.total_bytes, footprint.most_bytes) + taken)

    through = use_page_cache(
        wanted.page_cache,
        parts.manifest.layers,
        budget.slots,
        budget.total_bytes,
        parts.kind.worth_caching,
    )
    reader = open_reader(
        READ_THREADS,
        direct=not through,
        native=wanted.native,
        max_gap_bytes=GAP_BYTES,
    )
    flash = Flash(parts, folder, budget, reader, draft)
    files = {extent.path for extents in parts.extents for extent in extents}
    try:
        mx.reset_peak_memory()
        _read_resident(parts, folder)
        if draft is not None:
            draft.read()
        flash.cached_share = cached_before(files, not through)
        slots = _attach_slots(flash, parts, policy, wanted.overlap)
    except BaseException:
        flash.close()
        raise
    flash.pool = Pool(
        budget, footprint, slots, flash._fence.lock, flash.limits, folder, divide
    )
    if not (reader.direct or through):
        print(
            f"{folder} lies on a file system without direct I/O: reading through the "
            "page cache, so timings are not those of the disk.",
            file=sys.stderr,
        )
    if wanted.look_ahead:
        parts.look_ahead()
    if wanted.elastic or (wanted.elastic is None and str(memory).lower() == "auto"):
        flash.follow_pressure()
    flash.stats.reset()
    parts.model.flash = flash
    in_chunks(parts.model)
    return Loaded((parts.model, parts.config))


def _needs(
    parts: Assembled, policy: Lru, options: LoadOptions
) -> tuple[Footprint, Divide | None]:
    """What the model needs besides slots, and how slots are given to layers."""
    positions = parts.config.get("max_position_embeddings")
    context = options.context or min(DEFAULT_CONTEXT, positions or DEFAULT_CONTEXT)
    footprint = Footprint(parts.manifest, parts.shapes, parts.kind, context)
    kind, layers = parts.kind, parts.manifest.layers
    if not options.predictor:
        layers = tuple(replace(layer, predictor=None) for layer in layers)
    asks = asks_of(kind, layers, parts.shapes.experts_per_token)
    rewards = kind_rewards(kind, asks)
    if options.trace is None:
        divide = divide_by(asks, LOCALITY[kind.name], rewards)
        return footprint, divide
    return footprint, by_trace(Path(options.trace), parts.manifest, policy, rewards)


def _budget(
    memory: int | str,
    draft: DraftModel | None,
    footprint: Footprint,
    folder: Path,
    divide: Divide | None,
    least_context: int | None,
) -> Budget:
    """What a draft leaves of the memory, divided.

    Raises:
        NotEnoughMemory: If that is too little, with what both need.
    """
    if draft is None:
        return make_budget(memory, footprint, folder, divide, least_context)
    room = max(total_bytes(memory, footprint) - draft.nbytes, LEAST_BARE)
    try:
        return make_budget(room, footprint, folder, divide, least_context)
    except NotEnoughMemory as error:
        need = error.least_bytes + draft.nbytes
        raise NotEnoughMemory(
            f"{folder} needs at least --memory {say_memory(need)} with the draft "
            f"{draft.folder}, which takes {draft.nbytes / 1e6:,.1f} MB of it. Give "
            "more, or a smaller draft.",
            least_bytes=need,
        ) from error


def _read_resident(parts: Assembled, folder: Path) -> None:
    try:
        mx.eval(parts.model.parameters())
    except RuntimeError as error:
        raise FlashError(
            f"The weights of {folder} cannot be read: {reason_of(error)}. Check the "
            "disk, then download or convert the model again."
        ) from error


def _attach_slots(
    flash: Flash, parts: Assembled, policy: Lru, overlap: bool
) -> list[UnitSlots]:
    """Give every layer its slots, and fill those of layers that are held whole."""
    attached = []
    for i, layer in enumerate(parts.layers):
        slots = UnitSlots(
            parts.manifest.layers[i],
            parts.extents[i],
            flash.budget.slots[i],
            policy,
            flash._reader,
            flash._fence,
            flash.stats,
            layer.apart if overlap else 0.0,
        )
        layer.attach(slots, flash.budget.batch_tokens)
        if slots.n_slots == slots.units:
            slots.read_all()
        attached.append(slots)
    return attached


def _policy(options: LoadOptions, kind: UnitKind) -> Lru:
    policy = kind.policy if options.policy == "auto" else options.policy
    if policy == "lru":
        return Lru()
    if policy == "lrfu":
        return Lrfu()
    if policy == "window":
        if options.window < 1:
            raise FlashError(
                f"A window of {options.window} tokens keeps nothing. Try 4."
            )
        return Window(options.window)
    if isinstance(policy, str):
        raise FlashError(f"No policy is called {policy!r}. Try lru, lrfu or window.")
    return policy
