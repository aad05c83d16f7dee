"""Models of any size that nobody trained: the same random weights in every format.

A weight's values follow from its name alone, so that each file that is written of a
model holds the same ones. They are drawn when they are written, a matrix in memory at a
time. They have the right size, sign and spread, and mean nothing: only costs can be
measured with them.
"""

import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..arrays import parameters
from ..errors import FlashError
from ..models.registry import get_model_classes
from .report import progress

Shapes = dict[str, tuple[int, ...]]

TOKENS = 0.5  # spread of token embeddings: makes neighbours differ, as they do in text
# What attention and FFNs add must be small beside it. Else what all tokens share grows
# from layer to layer, and in 32 of them the tokens become one: 0.6 % of a layer was
# then read per token where predictors had been set for 2.4 %.
SMALL = 0.05
UP_RANK = 64  # of OPT's up projections, so that a predictor has something to find
ACTIVE = -1.3  # OPT's up bias in standard deviations: about a tenth is active


def parameter_shapes(config: dict) -> Shapes:
    """Shapes of all weights, by the names the model's modules have."""
    # The model's own weights are lazy: nothing is computed for them.
    return {name: array.shape for name, array in parameters(make_model(config)).items()}


def make_model(config: dict) -> nn.Module:
    """The model of a config.json, as MLX initialises it."""
    model_class, args_class = get_model_classes(config)
    args = args_class.from_dict(config)  # type: ignore[attr-defined] # all have it
    return model_class(args)


def weight(name: str, shape: tuple[int, ...], dtype: str) -> mx.array:
    """The values of one weight, uniform and not drawn yet."""
    if len(shape) == 1:
        if name.endswith("fc1.bias"):
            return mx.full(shape, ACTIVE, getattr(mx, dtype))
        kind = mx.ones if "norm.weight" in name else mx.zeros
        return kind(shape, getattr(mx, dtype))
    if name.endswith("fc1.weight"):
        return _low_rank(name, shape, dtype)
    spread = shape[-1] ** -0.5
    if "embed" in name:
        spread = TOKENS if "embed_tokens" in name else SMALL
    elif "fc2" in name or "out_proj" in name:
        spread *= SMALL
    return _uniform(shape, 0.77 * spread, key_of(name)).astype(getattr(mx, dtype))


def key_of(name: str) -> mx.array:
    """The key of all that is drawn for a weight."""
    return mx.random.key(zlib.crc32(name.encode()))


def _uniform(shape: tuple[int, ...], spread: float, key: mx.array) -> mx.array:
    edge = 3**0.5 * spread
    return mx.random.uniform(-edge, edge, shape, key=key)


def _low_rank(name: str, shape: tuple[int, ...], dtype: str) -> mx.array:
    """Rows that give pre-activations of unit variance, nine tenths from a low rank."""
    rows, columns = shape
    left, right, own = mx.random.split(key_of(name), 3)
    common = _uniform((rows, UP_RANK), (0.9 / UP_RANK / columns) ** 0.5, left)
    values = common @ mx.random.normal((UP_RANK, columns), key=right)
    values += _uniform(shape, (0.1 / columns) ** 0.5, own)
    return values.astype(getattr(mx, dtype))


def write_config(folder: Path, config: dict) -> None:
    """config.json, and a tokenizer that knows numbers: "17 4" are tokens 17 and 4."""
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {str(i): i for i in range(config["vocab_size"])},
            "unk_token": "0",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))


def write_checkpoint(
    folder: Path,
    config: dict,
    make: Callable[[str, tuple[int, ...]], dict[str, mx.array]],
    save: Callable[[Path, dict[str, mx.array]], None] | None = None,
) -> Path:
    """Write a checkpoint, a shard a layer, each made and let go before the next.

    Args:
        config: Its config.json, with "num_hidden_layers" and "vocab_size".
        make: Gives the arrays of a weight, by their names in the file.
        save: Writes a shard; by default MLX does.

    Returns:
        `folder`, which takes its name when it is whole.
    """
    shards: dict[str, Shapes] = {}
    for name, shape in parameter_shapes(config).items():
        found = re.search(r"\.layers\.(\d+)\.", name)
        shards.setdefault(found[1] if found else "outer", {})[name] = shape
    weight_map: dict[str, str] = {}
    with written_whole(folder) as part:
        write_config(part, config)
        for layer, shapes in progress(shards.items(), "writing a checkpoint", "shard"):
            file = f"model-{layer}.safetensors"
            made: dict[str, mx.array] = {}
            for name, shape in shapes.items():
                made |= make(name, shape)
            if save is None:
                mx.save_safetensors(str(part / file), made, {"format": "pt"})
            else:
                save(part / file, made)
            weight_map |= dict.fromkeys(made, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (part / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def plain_weights(dtype: str) -> Callable[[str, tuple[int, ...]], dict[str, mx.array]]:
    """`make` for `write_checkpoint`: each weight as it is, under its own name."""
    return lambda name, shape: {name: weight(name, shape, dtype)}


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, which becomes `folder` if nothing goes wrong."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def have_room(folder: Path, nbytes: int) -> None:
    """Judge the disk before anything is written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
    except OSError as error:
        raise FlashError(
            f"{folder} cannot be written: {error.strerror}. Give another --folder."
        ) from error
    if free < 1.02 * nbytes:
        raise FlashError(
            f"{folder} needs {nbytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB "
            "free. Free some space, or measure a smaller model."
        )
