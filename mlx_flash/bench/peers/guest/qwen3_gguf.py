"""Write a dense Qwen3 as GGUF: the same values under the names of that format."""

import json
from pathlib import Path

OUTER = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def write_gguf(source: str, target: Path) -> None:
    """Write a dense Qwen3 as GGUF, in float32."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((Path(source) / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    writer.add_token_merges(["t 0"])
    for file in sorted(Path(source).glob("*.safetensors")):
        for name, array in load_file(file).items():
            writer.add_tensor(gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """What a tensor of a Qwen3 is called in a GGUF."""
    stem = name.removeprefix("model.").removesuffix(".weight")
    if stem in OUTER:
        return f"{OUTER[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{LAYER[part.rpartition('.')[2]]}.weight"
