"""The cost model against runs on this machine: neurons, experts, blocks.

Models of about 1 GB with random weights in float32 (experts at 4 bits) generate within
some budgets; modelled stands beside measured. The share of units found in memory is the
run's own: what random weights choose says nothing about real models, and it is the
model of costs that is checked here. The profile is the one `mlx-flash probe` stored;
probe just before.
"""

from pathlib import Path
from typing import Annotated

import click

from ..converters.convert import convert
from ..errors import FlashError
from ..planning.plan import make_plan
from ..profile import Profile, load_profile
from . import moe
from .decode import run_model
from .families.configs import make_config
from .opt import Shape, flash_folder
from .options import Budgets, Count
from .report import Column, Report, Row
from .synthetic import plain_weights, write_checkpoint

OPT = Shape(5, 2048, 8192, heads=16, vocab=2048, dtype="float32")
LLAMA = make_config("llama") | {
    "hidden_size": 2048,
    "num_hidden_layers": 4,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
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
    folder: Annotated[Path, click.Path(path_type=Path)],
    kind: Annotated[
        tuple[str, ...],
        click.Choice(list(MODELS)),
        "Only this one; repeat it for more.",
    ] = (),
    memory: Budgets = ("50%", "65%", "80%"),
    prompt_tokens: Count = 8,
    tokens: Count = 24,
    rounds: Count = 2,
) -> Report:
    """The cost model of `mlx-flash plan` beside runs on this machine.

    Models of about 1 GB are written below FOLDER if they are not there.

    \b
    Example:
      mlx-flash probe DIR && mlx-flash bench plan-check DIR
    """
    profile = load_profile()
    if profile is None:
        raise FlashError("This machine has no profile yet. Make one: mlx-flash probe")
    folder.mkdir(parents=True, exist_ok=True)
    context, warm = prompt_tokens + tokens, tokens // 4
    lengths = prompt_tokens, tokens - warm
    rows = []
    for name in kind or MODELS:
        model = MODELS[name](folder)
        for budget in memory:
            title = f"{name}, {budget}"
            try:
                runs = [
                    run_model(title, model, budget, *lengths, warm_up=warm)
                    for _ in range(rounds)
                ]
            except FlashError as error:
                rows.append(Row.failed(title, error))
                continue
            best = min(runs, key=lambda row: row.total_ms or 0.0)
            rows.append(_beside(best, model, budget, profile, context))
    note = (
        f"Modelled and measured ms per token, the better of {rounds} runs of {tokens} "
        f"tokens, of which the first quarter fills the slots, on {profile.device}."
    )
    return Report("unit, memory", rows, COLUMNS, [note], {"profile": profile.source})


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
