"""Tiny OPT folders as the hub has them, made without MLX: the truth converters meet.

Safetensors are written and read by hand here, so that no code under test judges itself.
"""

import json
import struct
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, as in OPT
CONFIG = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 64,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    "activation_function": "relu",
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "tie_word_embeddings": True,
}
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U8": np.uint8}


def make_checkpoint(
    folder, dtype="float32", shards=1, seed=0, tokenizer=True, weights=None, **config
):
    """Write a folder with config, weights (random ones unless given) and tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    config = {**CONFIG, "dtype": dtype, **config}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = weights or random_weights(config, seed)
    stored = {name: to_dtype(w, dtype) for name, w in weights.items()}
    if shards == 1:
        save(folder / "model.safetensors", stored, dtype)
    else:
        save_shards(folder, stored, dtype, shards)
    if tokenizer:
        save_tokenizer(folder)
    return folder


def random_weights(config=CONFIG, seed=0):
    """float32 under the hub's names: every neuron matters, decoding varies."""
    rng = np.random.default_rng(seed)
    d, n = config["hidden_size"], config["ffn_dim"]
    top = "model.decoder"
    shapes = {
        f"{top}.embed_tokens.weight": (config["vocab_size"], d),
        f"{top}.embed_positions.weight": (config["max_position_embeddings"] + 2, d),
        f"{top}.final_layer_norm.weight": (d,),
        f"{top}.final_layer_norm.bias": (d,),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"{top}.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{layer}.self_attn.{name}.weight"] = (d, d)
            shapes[f"{layer}.self_attn.{name}.bias"] = (d,)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes[f"{layer}.{name}.weight"] = (d,)
            shapes[f"{layer}.{name}.bias"] = (d,)
        shapes[f"{layer}.fc1.weight"], shapes[f"{layer}.fc1.bias"] = (n, d), (n,)
        shapes[f"{layer}.fc2.weight"], shapes[f"{layer}.fc2.bias"] = (d, n), (d,)
    weights = {}
    for name, shape in shapes.items():
        scale = 0.1 if "embed_tokens" in name else 0.3
        weights[name] = rng.normal(0, scale, shape).astype(np.float32)
        if name.endswith("layer_norm.weight"):
            weights[name] += 1
    return weights


def to_dtype(array, dtype):
    """float32 as `dtype`; bfloat16 as its 16-bit words, cut off rather than rounded."""
    if dtype == "bfloat16":
        return (array.view(np.uint32) >> 16).astype(np.uint16)
    return array.astype(dtype)


def save(path, arrays, dtype="float32"):
    """Write a safetensors file of arrays that `to_dtype` made."""
    header, data = {}, b""
    for name, array in arrays.items():
        begin, data = len(data), data + array.tobytes()
        header[name] = {
            "dtype": CODES[dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, len(data)],
        }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def save_shards(folder, arrays, dtype, shards):
    """Write shards and the index that names them; later names in the earlier shards."""
    names = sorted(arrays, reverse=True)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        weight_map |= dict.fromkeys(names[i::shards], file)
        save(folder / file, {n: arrays[n] for n in names[i::shards]}, dtype)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def load(path):
    """{name: NumPy array of the stored words} of a safetensors file."""
    raw = Path(path).read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        begin, end = (start + n for n in entry["data_offsets"])
        words = np.frombuffer(raw[begin:end], NUMPY[entry["dtype"]])
        arrays[name] = words.reshape(entry["shape"])
    return arrays


def save_tokenizer(folder):
    """One token per byte, so that any text can be encoded; `</s>` begins a prompt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    bpe.add_special_tokens(SPECIAL)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def files_of(folder):
    """{relative path: bytes} of every file below a folder."""
    paths = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}
