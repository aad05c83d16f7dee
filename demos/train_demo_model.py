"""Train the small ReLU model that the other demos run.

    python demos/train_demo_model.py stories.txt --valid more.txt --out DIR

The model has the architecture of OPT, at 5.9 M parameters, and its own byte-level BPE
of 2048 tokens. Its FFN is 8 times as wide as the model and few of its neurons fire: a
ReLU FFN trained from scratch is sparse by itself, and an L1 penalty on the activations,
ramped in, makes it sparser where it is not. So neuron streaming has something to skip.

The text is read as one stream of stories, each ended by "</s>". Training takes random
crops of it; the last 5 % of the stories are kept back, and the weights that predict
those best are the ones written. VALID is read once, at the end, for the report.

Where others use the CPU too, OMP_WAIT_POLICY=passive in the environment keeps its
threads from spinning.

Shapes: B batch, L tokens of a window, K neurons of a layer.
"""

import argparse
import hashlib
import itertools
import json
import math
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, as in OPT
EOS, UNK = 2, 3
VOCABULARY = 2048
BATCH, WINDOW = 4, 512  # full windows, or the later positions would stay untrained
REPORT_WINDOW = 256
PEAK_LR, LEAST_LR, WARMUP = 2e-3, 1e-4, 0.03
TARGET_ZEROS = 0.93
DROPOUT, HIDDEN, WEIGHT_DECAY = 0.25, 0.1, 0.2
EVAL_EVERY_STEPS = 100

# UTF-8 punctuation that was once decoded as cp1252. It is mended in the tokenizer, not
# in the text, so that everybody who tokenizes the same file measures the same loss.
MENDED = {
    "â€œ": '"',
    "â€™": "'",
    "â€˜": "'",
    "â€“": "-",
    "â€”": "-",
    "â€Š": " ",
    "â€": '"',
}


def split_stories(text: str) -> list[str]:
    """Cut at lone newlines; paragraphs of one story have an empty line between."""
    stories: list[str] = []
    for part in re.split(r"(?<!\n)\n(?!\n)", text):
        # Some stories also separate paragraphs by one newline: short parts that do not
        # open a story belong to the one before.
        if stories and len(part) < 250 and not part.startswith(("Once", "One day")):
            stories[-1] += "\n\n" + part.strip()
        else:
            stories.append(part.strip())
    return [story.strip() for story in stories if story.strip()]


def hold_back(stories: list[str]) -> tuple[list[str], list[str]]:
    """Stories to train on, and those that begin in the last twentieth of the text."""
    ends = itertools.accumulate(map(len, reversed(stories)))
    n = 1 + sum(end < 0.05 * sum(map(len, stories)) for end in ends)
    return stories[:-n], stories[-n:]


def make_tokenizer(stories: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.Replace(wrong, right) for wrong, right in MENDED.items()]
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(stories, trainer)
    bpe.post_processor = TemplateProcessing(
        single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer, texts: list[str]) -> torch.Tensor:
    """One stream of token ids, "</s>" between the texts."""
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([i for row in rows for i in [*row, EOS]][:-1])


def make_model() -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        word_embed_proj_dim=256,
        ffn_dim=2048,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=WINDOW,
        dropout=DROPOUT,
    )
    return OPTForCausalLM(config)


def keep_activations(model) -> list[torch.Tensor]:
    """The ReLU outputs of the latest forward pass, [B, L, K] for each layer."""
    layers = model.model.decoder.layers
    latest = [torch.empty(0)] * len(layers)
    for i, layer in enumerate(layers):
        layer.activation_fn.register_forward_hook(
            lambda module, inputs, output, i=i: latest.__setitem__(i, output)
        )
    return latest


def l1(activations):
    """Mean activation, summed over the layers that have fewer zeros than the target.

    It lets go there, so that it cannot go on until a layer's neurons are dead.
    """
    return sum(
        a.float().mean()
        for a in activations
        if (a == 0).float().mean().item() < TARGET_ZEROS
    )


@torch.no_grad()
def measure(model, activations, tokens, window=REPORT_WINDOW) -> dict:
    """Loss over non-overlapping windows of TOKENS, each begun by "</s>".

    A window is "</s>" and the next `window - 1` tokens, which are what is predicted;
    tokens at the end that fill no window are left out.
    """
    model.eval()
    rows = tokens[: len(tokens) // (window - 1) * (window - 1)].view(-1, window - 1)
    loss, n_zeros, fired = 0.0, 0.0, 0.0
    for row in F.pad(rows, (1, 0), value=EOS).split(16):
        logits = model(input_ids=row).logits[:, :-1].float()
        loss += F.cross_entropy(
            logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum"
        ).item()
        a = torch.stack([a.flatten(0, -2) for a in activations])  # layers, BL, K
        n_zeros += (a == 0).float().mean(-1).sum(-1)
        fired += (a > 0).float().sum(1)
    model.train()
    loss /= rows.numel()
    return {
        "loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 3),
        "tokens": rows.numel(),
        "zeros": [round(z, 4) for z in (n_zeros / len(rows) / window).tolist()],
        "never_active": [round(n, 4) for n in (fired == 0).float().mean(-1).tolist()],
    }


def make_optimizers(model) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for all else."""
    # Held-out loss after 200 steps: 3.87, and 4.02 with AdamW for everything.
    layers = model.model.decoder.layers
    matrices = [p for p in layers.parameters() if p.dim() == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(
            matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(model, activations, stream, held_out, args) -> dict:
    """Train until the steps or minutes are done; load the best weights into MODEL."""
    optimizers = make_optimizers(model)
    best: dict = {"loss": math.inf}
    step, done, begin = 0, 0.0, time.monotonic()
    model.train()
    while done < 1:
        # Linear warm-up, then a cosine
        cosine = 0.5 + 0.5 * math.cos(math.pi * done)
        rate = min(1.0, done / WARMUP) * (LEAST_LR + (PEAK_LR - LEAST_LR) * cosine)
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = rate
        starts = torch.randint(len(stream) - WINDOW, (BATCH, 1))
        batch = F.pad(stream[starts + torch.arange(WINDOW - 1)], (1, 0), value=EOS)
        # Hiding a tenth of the tokens slows learning this little text by heart: a trial
        # without, and with less dropout, stopped improving after eight passes.
        hidden = torch.rand(BATCH, WINDOW) < HIDDEN
        hidden[:, 0] = False
        # bfloat16 is 1.6 times as fast as float32 where the CPU has AVX-512 BF16
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch.masked_fill(hidden, UNK), labels=batch).loss
        # The penalty is ramped in, so that neurons first learn something to keep.
        weight = args.sparsity * min(1.0, max(0.0, done - 0.05) / 0.25)
        (loss + weight * l1(activations)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        step, seconds = step + 1, time.monotonic() - begin
        done = step / args.steps if args.steps else seconds / 60 / args.minutes
        if step % EVAL_EVERY_STEPS == 0 or done >= 1:
            report = measure(model, activations, held_out)
            print(f"{min(done, 1):.0%}, step {step}: {report}", file=sys.stderr)
            if report["loss"] < best["loss"]:
                weights = {k: v.clone() for k, v in model.state_dict().items()}
                best = {"step": step, "loss": report["loss"], "weights": weights}
    model.load_state_dict(best["weights"])
    return {
        "steps": step,
        "best_step": best["step"],
        "minutes": round(seconds / 60, 1),
        "tokens_per_s": round(step * BATCH * WINDOW / seconds),
    }


def save(model, tokenizer, folder: Path) -> None:
    """Write the model in float16, with its tokenizer."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes a class name that transformers 4 does not know.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it 0600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="stories, separated by one newline")
    parser.add_argument("--valid", type=Path, required=True, help="text to report on")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=15, help="default: 15")
    length.add_argument("--steps", type=int, help="instead: exact, so repeatable")
    parser.add_argument("--sparsity", type=float, default=1.0, help="weight of the L1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"{args.out} is there already. Delete it, or choose another.")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    text = args.text.read_text()
    stories, kept_back = hold_back(split_stories(text))
    tokenizer = make_tokenizer(stories)
    stream = encode(tokenizer, stories)
    held_out = encode(tokenizer, kept_back)
    print(
        f"{len(stories)} stories of {len(stream):,} tokens to train on,"
        f" {len(kept_back)} of {len(held_out):,} held out",
        file=sys.stderr,
    )

    model = make_model()
    activations = keep_activations(model)
    trained = train(model, activations, stream, held_out, args)

    # Report on the weights as they are written: rounded to float16, used in float32.
    model.half().float()
    valid = encode(tokenizer, [args.valid.read_text()])
    report = {
        **measure(model, activations, valid),
        "held_out": measure(model, activations, held_out),
        "training": measure(model, activations, stream[: len(held_out)]),
        "parameters": sum(p.numel() for p in model.parameters()),
        **trained,
        "text": hashlib.sha256(text.encode()).hexdigest()[:16],
        "sparsity": args.sparsity,
        "seed": args.seed,
    }
    save(model, tokenizer, args.out)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
