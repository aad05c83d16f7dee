"""Models of any size that nobody trained, for benchmarks that only move bytes.

Random weights, written in bounded memory and in the real formats: flash folders with
mlx-flash's own writer, checkpoints as safetensors in shards.
"""

import json
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_flash.converters.bundles import write_bundles
from mlx_flash.converters.resident import write_weights
from mlx_flash.storage import manifest as format
from mlx_flash.storage.safetensors import Tensor, write_safetensors

bar = partial(tqdm, leave=False, disable=not sys.stderr.isatty())


def flash_folder(folder: Path, layers: int, units: int, dims: int) -> format.Manifest:
    """A flash folder with OPT's float16 bundles and next to nothing resident.

    A folder that is there already and has these sizes is taken as it is.
    """
    if (folder / format.MANIFEST).exists():
        manifest = format.read_manifest(folder)
        have = {(x.units, x.parts[0].shape) for x in manifest.layers}
        if len(manifest.layers) != layers or have != {(units, (dims,))}:
            raise SystemExit(f"{folder} has other sizes. Delete it: rm -r {folder}")
        return manifest
    (folder / "ffn").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    entries = []
    for index in bar(range(layers), desc="writing bundles", unit="layer"):
        parts = {
            name: random_half(rng, units, dims) for name in ("fc1.weight", "fc2.weight")
        }
        path = folder / f"ffn/layer_{index:02d}.safetensors"
        entries.append(write_bundles(path, f"model.decoder.layers.{index}.mlp", parts))
    nothing = {"nothing": mx.zeros((1,), mx.float16)}
    manifest = format.Manifest(
        format_version=format.FORMAT_VERSION,
        source="synthetic",
        revision=None,
        model_type="opt",
        unit="neuron",
        activation="relu",
        dtype="float16",
        resident=write_weights(folder / format.RESIDENT, nothing),
        predictors=None,
        calibration=None,
        layers=tuple(entries),
    )
    (folder / format.MANIFEST).write_text(manifest.to_json())
    return manifest


def random_half(rng: np.random.Generator, rows: int, columns: int) -> mx.array:
    """Random float16 bit patterns; without the exponent's top bit all are finite."""
    bits = np.frombuffer(rng.bytes(2 * rows * columns), np.uint16) & 0xBFFF
    return mx.array(bits.reshape(rows, columns)).view(mx.float16)


UP_RANK = 64  # of the up projections, so that a predictor has something to find
ACTIVE = -1.3  # up bias in standard deviations: about a tenth is active


def opt_checkpoint(folder: Path, dims: int, ffn: int, layers: int, vocab: int) -> int:
    """A float16 OPT checkpoint in one shard per layer; returns its bytes.

    Holds a few thousand rows of a matrix at a time. Its tokenizer knows numbers:
    "17 4" are the tokens 17 and 4.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": dims,
        "num_hidden_layers": layers,
        "num_attention_heads": max(dims // 128, 1),
        "ffn_dim": ffn,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "word_embed_proj_dim": dims,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {str(i): i for i in range(vocab)},
            "unk_token": "0",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    rng = np.random.default_rng(0)
    outer = {
        "decoder.embed_tokens.weight": _normal(rng, (vocab, dims), 0.02),
        "decoder.embed_positions.weight": _normal(rng, (2050, dims), 0.02),
    } | _norm("decoder.final_layer_norm", dims)
    shards = [outer]
    for i in range(layers):
        name = f"decoder.layers.{i}"
        tensors = {
            **_norm(f"{name}.self_attn_layer_norm", dims),
            **_norm(f"{name}.final_layer_norm", dims),
            f"{name}.fc1.weight": _low_rank(rng, ffn, dims),
            f"{name}.fc1.bias": _same(ffn, ACTIVE),
            f"{name}.fc2.weight": _normal(rng, (dims, ffn), (1 / ffn) ** 0.5),
            f"{name}.fc2.bias": _same(dims, 0),
        }
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weight = _normal(rng, (dims, dims), (1 / dims) ** 0.5)
            tensors[f"{name}.self_attn.{part}.weight"] = weight
            tensors[f"{name}.self_attn.{part}.bias"] = _same(dims, 0)
        shards.append(tensors)
    weight_map = {}
    for k, shard in enumerate(bar(shards, desc="writing a checkpoint", unit="shard")):
        file = f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
        shard = {f"model.{name}": tensor for name, tensor in shard.items()}
        write_safetensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(tensor.nbytes for shard in shards for tensor in shard.values())


def numbers_text(file: Path, tokens: int, vocab: int) -> None:
    """Random tokens as the tokenizer of `opt_checkpoint` reads them."""
    numbers = np.random.default_rng(0).integers(3, vocab, tokens)
    file.write_text(" ".join(map(str, numbers.tolist())))


ROWS = 4096  # of a matrix that are made at once


def _rows(shape, make) -> Tensor:
    def chunks():
        for start in range(0, shape[0], ROWS):
            n = min(ROWS, shape[0] - start)
            yield make((n, *shape[1:])).astype("<f2").tobytes()

    return Tensor("float16", tuple(shape), chunks)


def _normal(rng, shape, scale: float) -> Tensor:
    return _rows(shape, lambda s: scale * rng.standard_normal(s, np.float32))


def _low_rank(rng, rows: int, columns: int) -> Tensor:
    """Rows that give pre-activations of unit variance, nine tenths from a low rank."""
    basis = rng.standard_normal((UP_RANK, columns), np.float32)

    def make(shape):
        common = rng.standard_normal((shape[0], UP_RANK), np.float32) @ basis
        own = rng.standard_normal(shape, np.float32)
        return ((0.9 / UP_RANK) ** 0.5 * common + 0.1**0.5 * own) / columns**0.5

    return _rows((rows, columns), make)


def _same(size: int, value: float) -> Tensor:
    return _rows((size,), lambda s: np.full(s, value, np.float32))


def _norm(name: str, dims: int) -> dict[str, Tensor]:
    return {f"{name}.weight": _same(dims, 1), f"{name}.bias": _same(dims, 0)}
