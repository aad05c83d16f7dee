"""Load a flash folder into a model that mlx-lm's own functions accept.

The model is mlx-lm's (or ours in its style); only its FFN modules are exchanged for
ones that read what they need while they run. `model.flash` is the handle on
everything that an ordinary model does not have: figures, budget, files, `close`.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Unpack

import mlx.core as mx

from .adapters import adapter_digest, apply_adapter
from .assembly import Assembled, assemble, can_stream
from .attach import attach_beside, attach_slots, loading_bar
from .checkpoints.foresight_file import find_foresight, read_foresight
from .checkpoints.hub import find_model
from .checkpoints.record import check_files
from .checkpoints.tokenizer import check_vocabulary, load_tokenizer
from .chunks import in_chunks
from .draft_model import open_draft
from .errors import FlashError, NotEnoughMemory
from .flash import Flash, Loaded
from .layers.expert import ExpertFFN
from .layers.foresight import Foresight
from .load_options import LoadKeywords, LoadOptions
from .machines.division import Divide, facts_of
from .machines.follow import Follower
from .machines.lead import Lead
from .machines.start import start
from .memory.budget import LEAST_CONTEXT, total_bytes
from .memory.footprint import MAX_BATCH, MAX_PREFILL
from .memory.page_cache import use_page_cache
from .memory.policies import Lru
from .memory.pool import Pool
from .memory.system import check_gpu_memory
from .memory.trial import Trial
from .resident import read_weights
from .sizing import budget_of, needs_of, policy_of, with_hint
from .skipping import skip_neurons
from .storage.direct_io import cached_before
from .storage.limits import PAGE_BYTES
from .storage.open_files import allow_open_files
from .storage.reader import open_reader

READ_THREADS = 32  # the queue depth at which Apple's and other SSDs give most
# Read over such a gap: of 0 to 32 KiB the fastest for 1 KiB bundles, in any order.
GAP_BYTES = PAGE_BYTES


def load(
    path: str | Path,
    memory: int | float | str = "auto",
    trust_remote_code: bool = False,
    **options: Unpack[LoadKeywords],
) -> Loaded:
    """Load a model that runs as it lies, and its tokenizer.

    Args:
        path, memory: As for `load_model`.
        trust_remote_code: Whether the tokenizer may be code that the folder brings.
        options: `context=8192`, `policy="lru"` and so on: see `mlx_flash.LoadOptions`.

    Returns:
        (model, tokenizer), a tuple that is also a context manager.

    Raises:
        FlashError: As `load_model`, and if the folder has no tokenizer, or another
            model's.
    """
    follow_rank_0()
    folder = find_model(path, checkpoint=can_stream)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    model, _ = load_model(folder, memory, **options)
    try:
        check_vocabulary(tokenizer, folder, model.flash.vocabulary)
    except BaseException:
        model.flash.close()
        raise
    return Loaded((model, tokenizer))


def load_model(
    path: str | Path,
    memory: int | float | str = "auto",
    **options: Unpack[LoadKeywords],
) -> Loaded:
    """Load a flash folder without its tokenizer.

    Args:
        path: A flash folder, a checkpoint with experts, or a hub name of one.
        memory: All that the model may hold: bytes, "7GB", "50%" of it, or "auto".
        options: `context=8192`, `policy="lru"` and so on: see `mlx_flash.LoadOptions`.

    Returns:
        (model, config); `model.flash` is a `Flash`.

    Raises:
        FlashError: If the folder is missing, damaged, altered or newer, or does not
            fit.
    """
    wanted = LoadOptions(**options)
    machines = follow_rank_0()
    if machines is None:
        return _load(path, memory, wanted, None)
    return machines.load(partial(_load, path, memory, wanted), path, memory, wanted)


def follow_rank_0() -> Lead | None:
    """On rank 0 of several machines, what leads the others; None on one machine.

    On the other ranks this does what rank 0 says and ends the process. So a command
    begins with it: what rank 0 asks and prints is not for the others.
    """
    machines = start()
    if isinstance(machines, Follower):
        machines.follow(_load)
    return machines


def _load(
    path: str | Path,
    memory: int | float | str,
    wanted: LoadOptions,
    divide: Divide | None,
) -> Loaded:
    """Load a model, or the share of it that `divide` leaves this machine."""
    folder = find_model(path, checkpoint=can_stream)
    allow_open_files(len(list(folder.rglob("*.safetensors"))))
    parts = assemble(folder, wanted.predictor)
    # Before weights are read, and after what says more than that a file differs.
    check_files(folder, wanted.check)
    if wanted.skip:
        skip_neurons(parts, wanted.skip, folder)
    learned = _learned(parts, folder, wanted)
    policy = policy_of(wanted, parts.kind, foreseen=bool(learned))
    if divide is not None:
        parts, memory = _share(parts, folder, memory, policy, wanted, divide)
    elif (share := parts.manifest.share) is not None:
        raise FlashError(
            f"{folder} holds {share}, for as many machines. Start "
            f"them together: mlx.launch -n {len(share.shares)} …"
        )
    footprint, by_layer = needs_of(parts, policy, wanted)
    adapter = None
    if wanted.adapter_path is not None:
        adapter = apply_adapter(wanted.adapter_path, parts)
        footprint = replace(footprint, adapter_bytes=adapter.nbytes)
    more = footprint.adapter_bytes + sum(one.nbytes for one in learned)
    footprint = replace(footprint, adapter_bytes=more)
    least_context = None if wanted.context else LEAST_CONTEXT
    draft = None
    if wanted.draft_model is not None:
        draft = open_draft(wanted.draft_model, folder, footprint.context)
    try:
        budget = budget_of(memory, draft, footprint, folder, by_layer, least_context)
    except NotEnoughMemory as error:
        raise with_hint(error, parts) from None
    # Who gives more than the model can use, does no harm with it.
    taken = draft.nbytes if draft else 0
    check_gpu_memory(min(budget.total_bytes, footprint.most_bytes) + taken)

    blocks = parts.manifest.blocks
    through = use_page_cache(
        wanted.page_cache,
        parts.manifest.layers + blocks,
        budget.slots + budget.beside_slots[: len(blocks)],
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
    flash.adapter = adapter.sha256 if adapter else None
    flash.skip = wanted.skip or 0.0
    extents = (*parts.extents, *parts.beside_extents)
    files = {extent.path for places in extents for extent in places}
    try:
        mx.reset_peak_memory()
        with loading_bar(parts, budget, wanted.progress) as bar:
            read_weights(parts.model, folder, bar)
            if draft is not None:
                draft.read()
            flash.cached_share = cached_before(files, not through)
            slots = attach_slots(flash, parts, policy, wanted.overlap, bar)
            slots += attach_beside(flash, parts, bar)
    except BaseException:
        flash.close()
        raise
    flash.pool = Pool(
        budget, footprint, slots, flash._fence.lock, flash.limits, folder, by_layer
    )
    if not (reader.direct or through):
        print(
            f"{folder} lies on a file system without direct I/O: reading through the "
            "page cache, so timings are not those of the disk.",
            file=sys.stderr,
        )
    for layer, one in zip(parts.layers, learned, strict=False):
        layer.foresee(one)
    if wanted.look_ahead:
        parts.look_ahead(learned)
    elif learned and wanted.look_ahead is None:
        parts.look_ahead(learned, Trial())
    if wanted.elastic or (wanted.elastic is None and str(memory).lower() == "auto"):
        flash.follow_pressure()
    flash.stats.reset()
    parts.model.flash = flash
    in_chunks(parts.model)
    return Loaded((parts.model, parts.config))


def _learned(parts: Assembled, folder: Path, options: LoadOptions) -> list[Foresight]:
    """What was learned of the model, if anything is asked of it; [] without."""
    path = find_foresight(folder, parts.manifest)
    if path is None or (options.look_ahead is False and options.policy != "auto"):
        return []
    first = parts.layers[0]
    assert isinstance(first, ExpertFFN)
    return read_foresight(path, parts.manifest, first.dims)


def _share(
    parts: Assembled,
    folder: Path,
    memory: int | float | str,
    policy: Lru,
    options: LoadOptions,
    divide: Divide,
) -> tuple[Assembled, int]:
    """This machine's share of a model, and its memory in bytes.

    A share of memory, such as "50%", is one of the whole model.
    """
    footprint, _ = needs_of(parts, policy, options)
    total = total_bytes(memory, footprint)
    beside = footprint.fixed_bytes + footprint.workspace_bytes(MAX_PREFILL, MAX_BATCH)
    path = options.adapter_path
    adapter = None if path is None else adapter_digest(path)
    memory_bytes = min(total - beside, parts.manifest.ffn_bytes)
    return divide(parts, facts_of(parts, folder, memory_bytes, adapter)), total
