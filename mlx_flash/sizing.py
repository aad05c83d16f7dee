"""What a model needs in memory, and how a budget is divided, before it is loaded."""

from dataclasses import replace
from pathlib import Path

from .assembly import Assembled
from .draft_model import DraftModel
from .errors import FlashError, NotEnoughMemory
from .layers.kinds import BLOCK, EXPERT, UnitKind
from .load_options import LoadOptions
from .memory.budget import Budget, make_budget, total_bytes
from .memory.divide import Divide
from .memory.footprint import Footprint
from .memory.policies import Foreseen, Lrfu, Lru, Window
from .memory.whole import LOCALITY, asks_of, divide_by, kind_rewards
from .memory_size import LEAST_BARE, say_memory
from .traces.curves import by_trace

DEFAULT_CONTEXT = 2048
WORTH_BLOCKS_BYTES = 64_000_000  # from which a mixture's dense FFNs are worth a hint


def needs_of(
    parts: Assembled, policy: Lru, options: LoadOptions
) -> tuple[Footprint, Divide | None]:
    """What the model needs besides slots, and how slots are given to layers."""
    positions = parts.config.get("max_position_embeddings")
    context = options.context or min(DEFAULT_CONTEXT, positions or DEFAULT_CONTEXT)
    footprint = Footprint(
        parts.manifest, parts.shapes, parts.kind, context, dense=BLOCK
    )
    kind, layers = parts.kind, parts.manifest.layers
    if not options.predictor:
        layers = tuple(replace(layer, predictor=None) for layer in layers)
    needed = 1 - options.skip if options.skip else None
    asks = asks_of(kind, layers, parts.shapes.experts_per_token, needed)
    rewards = kind_rewards(kind, asks)
    if options.trace is None:
        divide = divide_by(asks, LOCALITY[kind.name], rewards)
        return footprint, divide
    return footprint, by_trace(Path(options.trace), parts.manifest, policy, rewards)


def budget_of(
    memory: int | float | str,
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


def with_hint(error: NotEnoughMemory, parts: Assembled) -> NotEnoughMemory:
    """The error with a way to need less, if dense FFNs of a mixture stay in memory."""
    if parts.kind is not EXPERT or parts.manifest.blocks:
        return error
    dense = BLOCK.find(parts.model).values()
    nbytes = sum(a.nbytes for ffn in dense for a in BLOCK.arrays(ffn).values())
    if nbytes < WORTH_BLOCKS_BYTES:
        return error
    return NotEnoughMemory(
        f"{error} Dense FFNs are {nbytes / 1e6:,.1f} MB of the resident weights: "
        "mlx-flash convert --blocks puts these on flash, too.",
        least_bytes=error.least_bytes,
    )


def policy_of(options: LoadOptions, kind: UnitKind, foreseen: bool = False) -> Lru:
    """What stays in memory.

    Args:
        foreseen: Whether the model has foresight, for which "auto" has a policy.

    Raises:
        FlashError: If there is no such policy, or a window that keeps nothing.
    """
    policy = options.policy
    if policy == "auto":
        policy = "foresight" if foreseen else kind.policy
    if policy in ("lru", "lrfu", "foresight"):
        return policy_named(policy, kind)
    if policy == "window":
        if options.window < 1:
            raise FlashError(
                f"A window of {options.window} tokens keeps nothing. Try 4."
            )
        return Window(options.window)
    if isinstance(policy, str):
        raise FlashError(f"No policy is called {policy!r}. Try lru, lrfu or window.")
    return policy


def policy_named(name: str, kind: UnitKind) -> Lru:
    """ "lru", "lrfu" or "foresight", as it suits a kind of units."""
    if name == "lru":
        return Lru()
    return (Foreseen if name == "foresight" else Lrfu)(kind.half_life)
