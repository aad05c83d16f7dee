"""The cost model against runs on this machine: neurons, experts, blocks.

Models of about 1 GB with random weights in float32 (experts at 4 bits) generate within
some budgets; modelled stands beside measured. The share of units found in memory is the
run's own: what random weights choose says nothing about real models, and it is the
model of costs that is checked here. The profile is the one `mlx-flash probe` stored;
probe just before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..converters.convert import convert
from ..errors import FlashError
from ..planning.plan import make_plan
from ..planning.profile import Profile, load_profile
from . import moe
from .decode import run_model
from .opt import Shape, flash_folder
from .report import Column, Report, Row
from .synthetic import plain_weights, write_checkpoint

OPT = Shape(5, 2048, 8192, heads=16, vocab=2048, dtype="float32")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 4,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "dtype": "float32",
}
COLUMNS = [
    Column("hit rate %", "hit_rate", 0.01, 1),
    Column("modelled ms", "modelled_ms", 1, 1),
    Column("measured ms", "total_ms", 1, 1),
    Column("off %", "off", 0.01),
    Column("modelled I/O", "modelled_io_ms", 1, 1),
    Column("measured I/O", "io_ms", 1, 1),
    Column("modelled compute", "modelled_compute_ms", 1, 1),
    Column("measured compute", "compute_ms", 1, 1),
]


def neurons(place: Path) -> Path:
    return flash_folder(place, OPT, "50%")


def experts(place: Path) -> Path:
    return moe.checkpoint(place / "experts", 3)


def blocks(place: Path) -> Path:
    folder, source = place / "blocks", place / "llama"
    if folder.exists():
        return folder
    if not source.exists():
        write_checkpoint(source, LLAMA, plain_weights("float32"))
    return convert(source, folder, progress=False)


MODELS = {"neurons": neurons, "experts": experts, "blocks": blocks}


def run(
    place: Path,
    kinds: Sequence[str] = (),
    budgets: Sequence[str] = ("50%", "65%", "80%"),
    prompt_tokens: int = 8,
    tokens: int = 24,
    rounds: int = 2,
) -> Report:
    """A row for each model and budget: the fastest of `rounds` runs.

    Args:
        place: Where the models are, or are written.
        kinds: Of `MODELS`, none for all.

    Raises:
        FlashError: If this machine has no profile.
    """
    profile = load_profile()
    if profile is None:
        raise FlashError("This machine has no profile yet. Make one: mlx-flash probe")
    place.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind in kinds or MODELS:
        folder = MODELS[kind](place)
        for memory in budgets:
            name = f"{kind}, {memory}"
            try:
                runs = [
                    _measure(name, folder, memory, prompt_tokens, tokens)
                    for _ in range(rounds)
                ]
            except FlashError as error:
                rows.append(Row(name, more={"error": str(error)}))
                continue
            best = min(runs, key=lambda row: row.total_ms or 0.0)
            context = prompt_tokens + tokens
            rows.append(_beside(best, folder, memory, profile, context))
    note = (
        f"Modelled and measured ms per token, the better of {rounds} runs of {tokens} "
        f"tokens, of which the first quarter fills the slots, on {profile.device}."
    )
    return Report("unit, memory", rows, COLUMNS, [note], {"profile": profile.source})


def _measure(
    name: str, folder: Path, memory: str, prompt_tokens: int, tokens: int
) -> Row:
    warm = tokens // 4
    run = run_model(folder, memory, prompt_tokens, tokens - warm, warm_up=warm)
    return run.row(name)


def _beside(row: Row, folder: Path, memory: str, profile: Profile, context: int) -> Row:
    """The row with what the plan says for its hit rate."""
    plan = make_plan(
        folder,
        memory,
        profile,
        context=context,
        prompt_tokens=context,
        hit_rate=row.more.get("hit_rate"),
    )
    # With a profile there are times.
    assert plan.ms_of_slowest is not None and plan.ms_per_token is not None
    parts, modelled = plan.ms_of_slowest, plan.ms_per_token[1]
    row.more |= {
        "modelled_ms": modelled,
        "modelled_io_ms": parts["io"],
        "modelled_compute_ms": parts["compute"],
        "modelled_bytes": plan.bytes_per_token[1],
        "off": modelled / row.total_ms - 1 if row.total_ms else None,
    }
    return row
