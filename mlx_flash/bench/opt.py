"""A synthetic OPT of any size: as a checkpoint, and as a flash folder."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..converters.bundles import write_bundles
from ..converters.resident import write_weights
from ..errors import FlashError
from ..layers.kinds import NEURON
from ..storage.manifest import FORMAT_VERSION, MANIFEST, RESIDENT, Manifest
from ..storage.manifest_reading import read_manifest
from ..storage.safetensors import DTYPES
from .report import progress
from .synthetic import (
    Shapes,
    have_room,
    parameter_shapes,
    weight,
    write_checkpoint,
    write_config,
    written_whole,
)

LINEARS = ("fc1", "fc2")  # the parts of a neuron's bundle
MODULE = "model.decoder.layers.{}.mlp"


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

    def weights(self) -> Shapes:
        """Shapes of all weights, by the names the model's modules have."""
        return parameter_shapes(self.config())

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        size = DTYPES[self.dtype][1]
        return size * sum(math.prod(shape) for shape in self.weights().values())


def checkpoint(folder: Path, shape: Shape) -> Path:
    """The Hugging Face checkpoint in `folder`, written if it is not there."""
    if not folder.exists():
        have_room(folder, shape.nbytes)
        write_checkpoint(
            folder,
            shape.config(),
            lambda name, size: {
                name.replace(".mlp.", "."): weight(name, size, shape.dtype)
            },
        )
    return folder


def numbers_text(file: Path, tokens: int, vocab: int) -> Path:
    """Write random tokens as the tokenizer of a synthetic model reads them."""
    numbers = np.random.default_rng(0).integers(3, vocab, tokens)
    file.write_text(" ".join(map(str, numbers.tolist())))
    return file


def flash_folder(place: Path, shape: Shape, memory: str | None = None) -> Path:
    """The flash folder of this shape in `place`, written if it is not there.

    With `memory` it has predictors, made for that budget.
    """
    folder = place / "opt-flash"
    if not folder.exists():
        write_flash(folder, shape)
    elif json.loads((folder / "config.json").read_text()) != shape.config():
        raise FlashError(
            f"{folder} holds a model of other sizes. Delete it, or give another "
            "--folder."
        )
    if memory and not read_manifest(folder).predictors:
        from .predictors import add_predictors

        add_predictors(folder, memory)
    return folder


def write_flash(folder: Path, shape: Shape) -> None:
    """A flash folder without predictors, whole or not at all."""
    have_room(folder, shape.nbytes)
    rest = {n: weight(n, size, shape.dtype) for n, size in shape.weights().items()}
    with written_whole(folder) as part:
        (part / "ffn").mkdir()
        write_config(part, shape.config())
        entries = []
        for i in progress(range(shape.layers), "writing bundles", "layer"):
            module, parts = MODULE.format(i), {}
            for linear in LINEARS:
                array = rest.pop(f"{module}.{linear}.weight")
                parts[f"{linear}.weight"] = array.T if linear == "fc2" else array
            path = part / f"ffn/layer_{i:02d}.safetensors"
            entries.append(write_bundles(path, module, parts))
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            source="synthetic",
            revision=None,
            model_type="opt",
            unit=NEURON.name,
            activation="relu",
            dtype=shape.dtype,
            resident=write_weights(part / RESIDENT, rest),
            predictors=None,
            calibration=None,
            layers=tuple(entries),
        )
        (part / MANIFEST).write_text(manifest.to_json())
