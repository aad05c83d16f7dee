"""Is every family of models the same from flash as it is in memory?

For each family a tiny checkpoint with random weights is written and loaded twice: by
mlx-lm as a whole, and by mlx-flash with slots for a quarter of a layer's experts,
neurons or blocks: in place, and converted. All read the same prompt and further tokens.
Experts must give the same bits; neurons and blocks are added up in another order, and
agree to 1e-4 of the largest logit.
"""

import contextlib
import io
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
from family_configs import DENSE, FAMILIES, make_config
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as load_resident
from mlx_lm.utils import quantize_model

import mlx_flash
from mlx_flash.assembly import assemble
from mlx_flash.layers import block
from mlx_flash.memory.budget import make_budget
from mlx_flash.models.registry import get_model_classes

PROMPT, DECODED = 70, 3  # mlx-lm sorts from 64 pairs on
DENSE_PROMPT = 40
BLOCK_BYTES = 2_000  # so that these small FFNs are more than one block
TOKENS = 60  # ids that every one of these vocabularies has
SUM_TOLERANCE = 1e-4  # of the largest logit, for sums in another order
MOST_VALUES = 20_000_000  # a config that forgets a size gets a model of billions
LIMIT_S = 180  # for one family; a crash of its process ends like this, too
ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens"


def write_checkpoint(folder: Path, config: dict, bits: int | None) -> Path:
    """A checkpoint as mlx-lm would save it, with random weights that all matter."""
    model_class, args_class = get_model_classes(config)
    model = model_class(args_class.from_dict(config))
    values = sum(array.size for _, array in tree_flatten(model.parameters()))
    if values > MOST_VALUES:
        raise ValueError(f"{values:,} values: its config here lacks a size")
    mx.random.seed(0)

    def draw(array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        around = 1.0 if array.ndim == 1 else 0.0  # norms
        return (around + 0.15 * mx.random.normal(array.shape)).astype(array.dtype)

    model.apply(draw)
    if bits:
        rule = getattr(model, "quant_predicate", None)  # routers, say, stay at 8 bits
        with contextlib.redirect_stdout(io.StringIO()):
            model, config = quantize_model(
                model, config, 32, bits, quant_predicate=rule
            )
    weights = dict(tree_flatten(model.parameters()))
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def few_slots(folder: Path) -> int:
    """The least memory in bytes with which a quarter of each layer's units fits."""
    parts = assemble(folder, predictor=False)

    def enough(memory: int) -> bool:
        try:
            budget = make_budget(memory, parts.manifest, parts.shapes, 128, folder)
        except mlx_flash.FlashError:
            return False
        layers = parts.manifest.layers
        return all(n >= x.units // 4 for n, x in zip(budget.slots, layers, strict=True))

    low, high = 0, 1 << 30
    while high - low > 1024:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def run(model, prompt: int) -> list[np.ndarray]:
    """Logits of a prompt, and of further tokens one by one."""
    tokens = np.random.default_rng(0).integers(0, TOKENS, (1, prompt + DECODED))
    cache = make_prompt_cache(model)
    steps = mx.split(mx.array(tokens), range(prompt, prompt + DECODED), axis=1)
    logits = [model(step, cache=cache).astype(mx.float32) for step in steps]
    return [np.array(mx.maximum(x, -1e9)) for x in logits]  # -inf rules a token out


def compare(folder: Path, expected: list[np.ndarray]) -> tuple[str, str, float]:
    """Stream the model in `folder`; (unit, layers from flash, largest difference)."""
    model, _ = mlx_flash.load_model(
        folder, few_slots(folder), predictor=False, context=128, page_cache=True
    )
    flash = model.flash
    try:
        actual = run(model, expected[0].shape[1])
    finally:
        flash.close()
    if flash.stats.misses == 0 or any(
        slots == layer.units
        for slots, layer in zip(flash.budget.slots, flash.manifest.layers, strict=True)
    ):
        raise RuntimeError("a layer was not streamed: this compares nothing")
    if not all(np.isfinite(e).all() and np.ptp(e) > 0 for e in expected):
        raise RuntimeError("the resident model's logits are NaN or all alike")
    diff = max(np.abs(a - e).max() for a, e in zip(actual, expected, strict=True))
    layers = f"{len(flash.layers)} of {len(flash.manifest.layers)}"
    return flash.manifest.unit, layers, float(diff)


def make_row(family: str) -> dict:
    return {"family": family, "unit": "", "layers": "", "from": "", "difference": None}


def check(family: str, checkpoint: Path | None, work: Path, bits: int | None) -> dict:
    """One row of the table. `checkpoint` is None where one has to be made."""
    row = make_row(family)
    dense = checkpoint is not None or family in DENSE
    block.BLOCK_BYTES = BLOCK_BYTES
    try:
        if checkpoint is None:
            config = make_config(family)
            checkpoint = write_checkpoint(work / "checkpoint", config, bits)
        resident, _ = load_resident(checkpoint, get_model_classes=get_model_classes)
        expected = run(resident, DENSE_PROMPT if dense else PROMPT)
    except (Exception, SystemExit) as error:  # a row; the others are still checked
        return row | {"verdict": f"mlx-lm cannot run it here: {reason(error)}"}
    try:
        results = {}
        if not dense:
            with contextlib.suppress(mlx_flash.FlashError):  # then only converted
                results["in place"] = compare(checkpoint, expected)
        flash = mlx_flash.convert(checkpoint, work / "flash", rank=0, progress=False)
        results["converted"] = compare(flash, expected)
    except mlx_flash.FlashError as error:
        return row | {"verdict": f"refused: {reason(error)}"}
    except Exception as error:
        return row | {"verdict": f"FAILED: {reason(error)}"}
    worst = max(difference for _, _, difference in results.values())
    scale = max(float(np.abs(e).max()) for e in expected)
    unit, layers, _ = results["converted"]
    allowed = 0.0 if unit == "expert" else SUM_TOLERANCE * scale
    return row | {
        "unit": unit,
        "layers": layers,
        "from": ", ".join(results),
        "difference": worst,
        "verdict": f"{worst:.2g}" + ("" if worst <= allowed else " DIFFERS"),
    }


def reason(error: BaseException) -> str:
    text = re.sub(tempfile.gettempdir() + r"\S*/", "", f"{error}")
    if not isinstance(error, mlx_flash.FlashError):
        text = f"{type(error).__name__} {text}"
    return " ".join(text.split())[:140]


def check_all(names: list[str], bits: int | None) -> Iterator[dict]:
    """The rows one by one, made in a process that may crash or hang."""
    families = all_families()
    spawn = multiprocessing.get_context("spawn")
    rest = list(names)
    while rest:
        with spawn.Pool(1) as pool, tempfile.TemporaryDirectory() as work:
            while rest:
                name = rest.pop(0)
                folder = Path(work) / name.replace("/", "-")
                folder.mkdir()
                result = pool.apply_async(check, (name, families[name], folder, bits))
                try:
                    yield result.get(LIMIT_S)
                except multiprocessing.TimeoutError:
                    verdict = f"FAILED: crashed, or took more than {LIMIT_S} s"
                    yield make_row(name) | {"verdict": verdict}
                    break  # with this pool
            else:
                pool.close()
                pool.join()


def all_families() -> dict[str, Path | None]:
    """Every family by name; those of ours with a checkpoint from the tests."""
    ours = {f"{p.parent.name}/{p.name}": p for p in sorted(GOLDENS.glob("*/*"))}
    return dict.fromkeys(FAMILIES) | dict.fromkeys(DENSE) | ours


HEAD = (
    "| family | unit | layers from flash | largest difference to the reference |",
    "| --- | --- | --- | --- |",
)


def line(row: dict) -> str:
    cells = [row[k] for k in ("family", "unit", "layers", "verdict")]
    return f"| {' | '.join(cells)} |"


def summarise(rows: list[dict]) -> dict:
    def names(test) -> list[str]:
        return [row["family"] for row in rows if test(row)]

    return {
        "compared": len(names(lambda row: row["unit"])),
        "experts": len(names(lambda row: row["unit"] == "expert")),
        "in_place": len(names(lambda row: "in place" in row["from"])),
        "blocks": len(names(lambda row: row["unit"] == "block")),
        "neurons": len(names(lambda row: row["unit"] == "neuron")),
        "identical": len(names(lambda row: row["difference"] == 0)),
        "differ": names(lambda row: "DIFFERS" in row["verdict"]),
        "failed": names(lambda row: "FAILED" in row["verdict"]),
        "not_compared": names(lambda row: not row["unit"]),
        "device": str(mx.default_device()),
        "mlx": mx.__version__,
        "mlx_lm": version("mlx_lm"),
    }


def write_readme(rows: list[dict], facts: dict) -> None:
    """Put the table between the README's markers."""
    path = ROOT / "README.md"
    before, begin, rest = path.read_text().partition("<!-- families -->")
    _, end, after = rest.partition("<!-- /families -->")
    if not end:
        raise click.ClickException(f"{path} has no place for the table.")
    compared = [line(row) for row in rows if row["unit"]]
    others = [f"{row['family']} ({row['verdict']})" for row in rows if not row["unit"]]
    text = f"""
<details>
<summary>{facts["compared"]} models compared: {facts["experts"]} with experts,
{facts["blocks"]} in blocks, {facts["neurons"]} in neurons</summary>

`python demos/families.py --readme` wrote this. For each family a tiny random
checkpoint, slots for a quarter of each layer's units, a prompt of {PROMPT} tokens
({DENSE_PROMPT} for dense models) and {DECODED} steps of decoding; the largest
difference of any logit to the same model in memory (mlx-lm's, or ours where it has
none), 0 being identical to the bit. float32, MLX {facts["mlx"]} on its CPU backend,
mlx-lm {facts["mlx_lm"]}. All were streamed from converted folders, {facts["in_place"]}
of those with experts also in place. Layers are those that have such FFNs: Gemma 3n's
sparse ones are no sums over their neurons, and stay in memory.

{chr(10).join((*HEAD, *compared))}

Not compared: {"; ".join(others) or "none"}.

</details>
"""
    path.write_text(before + begin + text + end + after)


@click.command()
@click.option("--family", help="Only this one.")
@click.option("--bits", type=int, help="Quantise the checkpoints, as mlx-lm does.")
@click.option("--readme", is_flag=True, help="Write the table into README.md.")
def main(family, bits, readme):
    """Compare every family from flash with the same model in memory."""
    families = all_families()
    if family and family not in families:
        raise click.BadParameter(f"{family!r} is none of {', '.join(families)}.")
    if readme and (family or bits or mx.default_device() != mx.cpu):
        raise click.UsageError("--readme is for all families in float32 on the CPU.")
    print("\n".join(HEAD))
    begin, rows = time.perf_counter(), []
    for row in check_all([family] if family else list(families), bits):
        print(line(row), flush=True)
        rows.append(row)
    facts = summarise(rows)
    seconds = round(time.perf_counter() - begin, 1)
    print(json.dumps(facts | {"bits": bits, "seconds": seconds}))
    if readme:
        write_readme(rows, facts)
    sys.exit(1 if facts["differ"] or facts["failed"] else 0)


if __name__ == "__main__":
    main()
