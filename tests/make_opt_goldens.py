"""Make tests/goldens/opt: tiny OPT checkpoints and the logits transformers gives them.

Run it again only to change a variant: python tests/make_opt_goldens.py
Needs torch and transformers; the tests that read the files need neither.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import OPTConfig, OPTForCausalLM

GOLDENS = Path(__file__).parent / "goldens" / "opt"
LEFT_PADDING = 4

# Width 24 keeps a checkpoint near 60 KB. ffn_dim and vocab_size differ from every
# other size, so that a transposed or swapped weight cannot fit.
BASE = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "ffn_dim": 48,
    "max_position_embeddings": 64,
}
VARIANTS = {
    "pre_ln": {},
    "post_ln_proj": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "no_bias_untied": {
        "enable_bias": False,
        "tie_word_embeddings": False,
        "_remove_final_layer_norm": True,
        "ffn_dim": 40,
    },
}


def make_model(seed: int, **changes) -> OPTForCausalLM:
    """A random OPT whose biases, norms and padding rows are as random as the rest."""
    generator = torch.Generator().manual_seed(seed)
    model = OPTForCausalLM(OPTConfig(**{**BASE, **changes})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3, generator=generator)
            if "layer_norm.weight" in name:
                p.add_(1.0)
    return model


def save_golden(name: str, changes: dict, seed: int):
    folder = GOLDENS / name
    shutil.rmtree(folder, ignore_errors=True)
    model = make_model(seed, **changes)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, BASE["vocab_size"], (2, 12), generator=generator)
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


if __name__ == "__main__":
    for seed, (name, changes) in enumerate(VARIANTS.items()):
        save_golden(name, changes, seed)
