"""Make tests/goldens/{falcon,persimmon,relu_llama}: tiny checkpoints and their logits.

Run it again only to change a variant: python tests/make_goldens.py [family …]
Needs torch and transformers; the tests that read the files need neither.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PersimmonConfig,
    PersimmonForCausalLM,
)

GOLDENS = Path(__file__).parent / "goldens"
LEFT_PADDING = 4
VOCAB = 61
THRESHOLD = 0.4  # ProSparse has 0.01; this one is not to be mistaken for 0

# Width 24 keeps a golden below 60 KB. FFN and vocabulary differ from every other size,
# so that a transposed or swapped weight cannot fit.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def rope(theta: float, **more) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


FALCON = {
    "multi_query": {"num_attention_heads": 3, "ffn_hidden_size": 64},  # as Falcon-7B
    "grouped": {  # as Falcon-40B
        "new_decoder_architecture": True,
        "num_attention_heads": 6,
        "num_kv_heads": 2,
        "ffn_hidden_size": 40,
    },
    "relufied": {  # as Falcon-11B, with ReLU
        "new_decoder_architecture": True,
        "num_attention_heads": 6,
        "num_kv_heads": 3,
        "num_ln_in_parallel_attn": 1,
        "ffn_hidden_size": 56,
        "activation": "relu",
        "tie_word_embeddings": False,
        **rope(500042.0),
    },
    "sequential": {  # as Falcon-RW but for its alibi
        "multi_query": False,
        "parallel_attn": False,
        "num_attention_heads": 3,
        "ffn_hidden_size": 40,
        "bias": True,
        "activation": "relu2",
        "layer_norm_epsilon": 0.01,
        **rope(10000.0, rope_type="linear", factor=4.0),
    },
}
PERSIMMON = {
    "base": {
        "num_attention_heads": 3,
        "intermediate_size": 36,
        **rope(25000.0, partial_rotary_factor=0.5),
    },
    "relu_no_qk_norm": {
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "qk_layernorm": False,
        "hidden_act": "relu",
        "layer_norm_eps": 0.01,
        "tie_word_embeddings": True,
        **rope(100.0, partial_rotary_factor=0.75, rope_type="linear", factor=4.0),
    },
}
LLAMA = {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 40}
# What config.json says of each, and the function that transformers does not have.
RELU_LLAMA = {
    "relu": ({"hidden_act": "relu"}, None),  # ReluLLaMA
    "relu2": ({"hidden_act": "relu2"}, None),
    "fatrelu": (  # ProSparse
        {
            "model_type": "sparsellama",
            "hidden_act": "fatrelu",
            "hidden_act_param": THRESHOLD,
        },
        lambda gate, up: torch.where(gate > THRESHOLD, gate, 0.0) * up,
    ),
    "drelu": (  # Bamboo
        {"model_type": "bamboo", "hidden_act": "relu"},
        lambda gate, up: torch.clamp(gate, min=0) * torch.clamp(up, min=0),
    ),
}


def randomise(model, seed: int):
    """Make biases and norms as random as the rest."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                p.normal_(std=0.3, generator=generator)
                if name == "weight" and "Norm" in type(module).__name__:
                    p.add_(1.0)
        if model.config.tie_word_embeddings:
            model.tie_weights()
    return model.eval()


def make_falcon(variant: str, seed: int):
    config = FalconConfig(**SIZES, **FALCON[variant])
    return randomise(FalconForCausalLM(config), seed), {}


def make_persimmon(variant: str, seed: int):
    config = PersimmonConfig(**SIZES, **PERSIMMON[variant])
    return randomise(PersimmonForCausalLM(config), seed), {}


def make_relu_llama(variant: str, seed: int):
    """A Llama (for Bamboo a Mistral), its activation exchanged for `gated`."""
    says, gated = RELU_LLAMA[variant]
    sizes = {**SIZES, **LLAMA, **rope(25000.0)}
    act = says["hidden_act"] if gated is None else "relu"
    if variant == "drelu":
        config = MistralConfig(**sizes, hidden_act=act, sliding_window=None)
        model = MistralForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, hidden_act=act))
    if gated is not None:
        for layer in model.model.layers:
            exchange_activation(layer.mlp, gated)
    return randomise(model, seed), says


def exchange_activation(mlp, gated):
    def forward(x):
        return mlp.down_proj(gated(mlp.gate_proj(x), mlp.up_proj(x)))

    mlp.forward = forward


def save_golden(folder: Path, model, says: dict, seed: int):
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text()) | says
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, VOCAB, (2, 12), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, :LEFT_PADDING] = 0
    with torch.no_grad():
        logits = model(tokens).logits
        padded = model(tokens, attention_mask=mask).logits[1, LEFT_PADDING:]
    save_file(
        {
            "tokens": tokens.int(),
            "logits": logits,
            # row 1 again, its first tokens now padding; only what follows them
            "logits_after_padding": padded.contiguous(),
        },
        folder / "expected.safetensors",
    )
    for file in folder.iterdir():
        file.chmod(0o644)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{folder}: {size:,} bytes, logits within {logits.abs().max():.1f}")


FAMILIES = {
    "falcon": (make_falcon, FALCON),
    "persimmon": (make_persimmon, PERSIMMON),
    "relu_llama": (make_relu_llama, RELU_LLAMA),
}

if __name__ == "__main__":
    for family in sys.argv[1:] or FAMILIES:
        make, variants = FAMILIES[family]
        for seed, variant in enumerate(variants):
            save_golden(GOLDENS / family / variant, *make(variant, seed), seed)
