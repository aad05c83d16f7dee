"""An OPT of any size that nobody trained: the same random weights in every format.

A weight's values follow from its name alone, so that each file that is written of the
model holds the same ones, a matrix in memory at a time. They have the right size, sign
and spread, and mean nothing: only costs can be measured with them.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..converters.bundles import write_bundles
from ..errors import FlashError
from ..models.opt import Model, ModelArgs
from ..storage import manifest as format
from ..storage.safetensors import DTYPES, Tensor, write_safetensors
from .report import progress

LINEARS = ("fc1", "fc2")  # the parts of a neuron's bundle
MODULE = "model.decoder.layers.{}.mlp"

# (sign and mantissa, exponent's bias, mantissa bits) of a dtype, as unsigned words
FLOATS = {
    "float32": (np.uint32, 0x807FFFFF, 127, 23),
    "float16": (np.uint16, 0x83FF, 15, 10),
    "bfloat16": (np.uint16, 0x807F, 127, 7),
}
TOKENS = 0.5  # spread of token embeddings: makes neighbours differ, as they do in text
# What attention and FFNs add must be small beside it. Else what all tokens share grows
# from layer to layer, and in 32 of them the tokens become one: 0.6 % of a layer was
# then read per token where predictors had been set for 2.4 %.
SMALL = 0.05


@dataclass(frozen=True)
class Shape:
    """Sizes of an OPT; the defaults are those of OPT-6.7B."""

    layers: int = 32
    dims: int = 4096
    units: int = 16384
    heads: int = 32
    vocab: int = 50272
    positions: int = 2048
    dtype: str = "float16"

    def config(self) -> dict:
        return {
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            "vocab_size": self.vocab,
            "hidden_size": self.dims,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "ffn_dim": self.units,
            "max_position_embeddings": self.positions,
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "word_embed_proj_dim": self.dims,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
            "torch_dtype": self.dtype,
        }

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all weights, by the names the model's modules have."""
        model = Model(ModelArgs.from_dict(self.config()))
        return {name: a.shape for name, a in tree_flatten(model.parameters())}

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        size = DTYPES[self.dtype][1]
        return size * sum(math.prod(shape) for shape in self.weights().values())


def weight(name: str, shape: tuple[int, ...], dtype: str) -> mx.array:
    """The values of one weight: ± [1, 2) times a power of two, uniform bits."""
    if len(shape) == 1:
        kind = mx.ones if "norm.weight" in name else mx.zeros
        return kind(shape, getattr(mx, dtype))
    spread = shape[-1] ** -0.5
    if "embed" in name:
        spread = TOKENS if "embed_tokens" in name else SMALL
    elif "fc2" in name or "out_proj" in name:
        spread *= SMALL
    word, mask, bias, mantissa = FLOATS[dtype]
    exponent = math.floor(math.log2(spread / 1.53))  # the spread of ± [1, 2)
    count = math.prod(shape)
    raw = np.random.SFC64(zlib.crc32(name.encode())).random_raw(
        -(-count * word().itemsize // 8)
    )
    bits = raw.view(word)[:count].reshape(shape)
    bits &= word(mask)
    bits |= word((exponent + bias) << mantissa)
    return mx.array(bits).view(getattr(mx, dtype))


def write_config(folder: Path, shape: Shape) -> None:
    """config.json, and a tokenizer that knows numbers: "17 4" are tokens 17 and 4."""
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {str(i): i for i in range(shape.vocab)},
            "unk_token": "0",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))


def write_flash(folder: Path, shape: Shape) -> format.Manifest:
    """A flash folder without predictors, whole or not at all."""
    have_room(folder, shape.nbytes)
    shapes = shape.weights()
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "ffn").mkdir(parents=True)
    try:
        write_config(part, shape)
        entries = []
        for i in progress(range(shape.layers), "writing bundles", "layer"):
            module, parts = MODULE.format(i), {}
            for linear in LINEARS:
                name = f"{module}.{linear}.weight"
                array = weight(name, shapes.pop(name), shape.dtype)
                parts[f"{linear}.weight"] = array.T if linear == "fc2" else array
            path = part / f"ffn/layer_{i:02d}.safetensors"
            entries.append(write_bundles(path, module, parts))
        resident = {name: (name, size) for name, size in shapes.items()}
        path = part / format.RESIDENT
        sha256, nbytes = write_tensors(path, resident, shape.dtype)
        manifest = format.Manifest(
            format_version=format.FORMAT_VERSION,
            source="synthetic",
            revision=None,
            model_type="opt",
            unit="neuron",
            activation="relu",
            dtype=shape.dtype,
            resident=format.Weights(format.RESIDENT, sha256, nbytes),
            predictors=None,
            calibration=None,
            layers=tuple(entries),
        )
        (part / format.MANIFEST).write_text(manifest.to_json())
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return manifest


def write_tensors(
    path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], dtype: str
) -> tuple[str, int]:
    """Write {name in the file: (weight, shape)}; returns SHA-256 and bytes."""

    def made(name: str, shape: tuple[int, ...]) -> Tensor:
        def chunks() -> Iterator[memoryview]:
            array = weight(name, shape, dtype).reshape(-1)
            yield np.asarray(array.view(mx.uint8)).data

        return Tensor(dtype, shape, chunks)

    made_tensors = {key: made(*what) for key, what in tensors.items()}
    sha256 = write_safetensors(path, made_tensors)
    return sha256, sum(tensor.nbytes for tensor in made_tensors.values())


def have_room(folder: Path, nbytes: int) -> None:
    """Judge the disk before anything is written.

    Raises:
        FlashError: If `nbytes` do not fit where `folder` is to be.
    """
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
            "free. Free some space, or measure a smaller --shape."
        )


def flash_folder(place: Path, shape: Shape, memory: str | None = None) -> Path:
    """The flash folder of this shape in `place`, written if it is not there.

    With `memory` it has predictors, made for that budget.

    Raises:
        FlashError: If there is another model, or no room.
    """
    folder = place / "opt-flash"
    if not folder.exists():
        write_flash(folder, shape)
    elif json.loads((folder / "config.json").read_text()) != shape.config():
        raise FlashError(
            f"{folder} holds a model of other sizes. Delete it, or give another "
            "--folder."
        )
    if memory and not format.read_manifest(folder).predictors:
        from .predictors import add_predictors

        add_predictors(folder, memory)
    return folder
