"""Write the synthetic OPT for llama.cpp: the same values in its format, GGUF.

llama.cpp has no OPT. Its GPT-2 is the same network but for GELU in place of ReLU:
learned positions, layer norms before attention and FFN, biases everywhere, a tied head.
All sizes are equal and so is the work, as llama.cpp looks for no zeros.
"""

import math
from collections import defaultdict
from pathlib import Path

import mlx.core as mx
import numpy as np

from ...errors import FlashError
from ...models.opt import POSITION_OFFSET
from ..opt import Shape
from ..report import progress
from ..synthetic import have_room, weight

# the model's names → GPT-2's in GGUF; q, k and v become one
OUTER_NAMES = {
    "embed_tokens": "token_embd",
    "embed_positions": "position_embd",
    "final_layer_norm": "output_norm",
}
LAYER_NAMES = {
    "self_attn_layer_norm": "attn_norm",
    "self_attn.out_proj": "attn_output",
    "final_layer_norm": "ffn_norm",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def write_gguf(path: Path, shape: Shape) -> None:
    """A GPT-2 of the same weights for llama.cpp.

    Raises:
        FlashError: If the gguf package is not there, or the disk is too small.
    """
    try:
        import gguf
    except ImportError:
        raise FlashError(
            "Writing for llama.cpp needs the gguf package: pip install gguf"
        ) from None
    have_room(path, shape.nbytes)
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, "gpt2")
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.dims)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.units)
    writer.add_head_count(shape.heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(shape.vocab)])
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(2)
    tensors = gguf_tensors(shape)
    for name, (_, size, dtype) in tensors.items():
        writer.add_tensor_info(name, size, dtype, math.prod(size) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (sources, size, dtype) in progress(tensors.items(), "writing", "tensor"):
        pieces = [weight(n, s, shape.dtype) for n, s in sources]
        array = np.asarray(mx.concatenate(pieces)[-size[0] :])
        if name == "position_embd.weight":
            assert len(pieces[0]) - size[0] == POSITION_OFFSET
        writer.write_tensor_data(array.astype(dtype, copy=False))
    writer.close()
    part.rename(path)


def gguf_tensors(shape: Shape) -> dict[str, tuple[list, tuple[int, ...], np.dtype]]:
    """{GGUF name: (its sources, shape, dtype)}; vectors are always float32 there."""
    sources: dict[str, list] = defaultdict(list)
    for name, size in shape.weights().items():
        sources[_gguf_name(name)].append((name, size))
    found = {}
    for name, pieces in sources.items():
        rows = sum(size[0] for _, size in pieces)
        rows -= POSITION_OFFSET if name == "position_embd.weight" else 0
        size = rows, *pieces[0][1][1:]
        dtype = "float32" if len(size) == 1 or "position" in name else shape.dtype
        found[name] = pieces, size, np.dtype(dtype)
    return found


def _gguf_name(name: str) -> str:
    stem, kind = name.removeprefix("model.decoder.").rsplit(".", 1)
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.{kind}"
    _, layer, rest = stem.split(".", 2)
    return f"blk.{layer}.{LAYER_NAMES.get(rest, 'attn_qkv')}.{kind}"
