"""Train the small mixture of experts that `--model demo-moe` runs.

    python demos/train_demo_moe.py stories.txt --valid more.txt --out DIR

The model has the layout of Qwen3-MoE in transformers, at 14 M parameters: 6 layers of
32 experts, of which a token uses 4. Its tokenizer is the one of `train_demo_model.py`,
so that one demo model can draft for the other. The loss has the load-balancing term of
Switch Transformers (arXiv 2101.03961), layer by layer.

The text is read and held out as in `train_demo_model.py`.

Shapes: B batch, L tokens of a window, T = B * L, E experts of a layer.
"""

import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from train_demo_model import (
    BATCH,
    EOS,
    HIDDEN,
    LEAST_LR,
    PEAK_LR,
    REPORT_WINDOW,
    UNK,
    VOCABULARY,
    WARMUP,
    WINDOW,
    encode,
    hold_back,
    make_tokenizer,
    save,
    split_stories,
)
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

LAYERS, EXPERTS, TOP_K = 6, 32, 4
DROPOUT, WEIGHT_DECAY = 0.2, 0.2
BALANCE = 0.01  # weight of the load-balancing loss, as in Switch Transformers
EVAL_EVERY_STEPS = 100


def make_model(activation: str) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=320,
        intermediate_size=1024,  # of dense layers, of which there are none
        moe_intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        hidden_act=activation,
        rope_theta=10000.0,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=1,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")  # the loop takes 1.4 times as long
    return model


def add_dropout(model) -> None:
    """Drop parts of what each block adds to the residual: Qwen3-MoE has none of it."""

    def drop(module, inputs, output):
        if isinstance(output, tuple):
            return F.dropout(output[0], DROPOUT, module.training), *output[1:]
        return F.dropout(output, DROPOUT, module.training)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)
    model.model.embed_tokens.register_forward_hook(drop)


def balance_loss(router_logits) -> torch.Tensor:
    """Switch Transformers' loss for each layer, its mean; 1 where experts are even.

    Args:
        router_logits: For each layer, [T, E].
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = probabilities.topk(TOP_K, dim=-1).indices
        share = F.one_hot(chosen, EXPERTS).float().sum(1).mean(0) / TOP_K
        losses.append(EXPERTS * (share * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def measure(model, tokens, window=REPORT_WINDOW) -> dict:
    """Loss over non-overlapping windows of TOKENS, and how the router spreads them.

    A window is "</s>" and the next `window - 1` tokens, which are what is predicted.

    Returns:
        Loss and perplexity; for each layer the entropy of the router's softmax in bits
        (5 would be even over 32), the entropy of how often each expert is used, and
        the share of a token's experts that the token before it used too.
    """
    model.eval()
    rows = tokens[: len(tokens) // (window - 1) * (window - 1)].view(-1, window - 1)
    loss = 0.0
    entropy, reuse = torch.zeros(LAYERS), torch.zeros(LAYERS)
    used = torch.zeros(LAYERS, EXPERTS)
    for row in F.pad(rows, (1, 0), value=EOS).split(16):
        out = model(input_ids=row, output_router_logits=True)
        logits = out.logits[:, :-1].float()
        loss += F.cross_entropy(
            logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum"
        ).item()
        for i, scores in enumerate(out.router_logits):
            p = scores.float().view(len(row), window, EXPERTS).softmax(-1)
            entropy[i] += -(p * p.clamp_min(1e-9).log2()).sum(-1).mean() * len(row)
            hot = F.one_hot(p.topk(TOP_K, dim=-1).indices, EXPERTS).sum(2).float()
            both = (hot[:, 1:] * hot[:, :-1]).sum(-1) / TOP_K
            reuse[i] += both.mean() * len(row)
            used[i] += hot.sum((0, 1))
    model.train()
    loss /= rows.numel()
    share = used / used.sum(-1, keepdim=True)
    spread = -(share * share.clamp_min(1e-9).log2()).sum(-1)
    return {
        "loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 3),
        "tokens": rows.numel(),
        "router_entropy": [round(e, 2) for e in (entropy / len(rows)).tolist()],
        "use_entropy": [round(e, 2) for e in spread.tolist()],
        "reuse": [round(r, 3) for r in (reuse / len(rows)).tolist()],
    }


def make_optimizers(model) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention, AdamW for experts, routers and all else."""
    matrices = [p for layer in model.model.layers for p in layer.self_attn.parameters()]
    matrices = [p for p in matrices if p.dim() == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    decayed = [p for p in rest if p.dim() == 3]  # experts: [E, outputs, inputs]
    others = [p for p in rest if p.dim() != 3]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(
            matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, betas=(0.9, 0.95)),
    ]


def train(model, stream, held_out, args) -> dict:
    """Train until the steps or minutes are done; load the best weights into MODEL."""
    optimizers = make_optimizers(model)
    best: dict = {"loss": math.inf}
    curve = []
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
        hidden = torch.rand(BATCH, WINDOW) < HIDDEN
        hidden[:, 0] = False
        with torch.autocast("cpu", torch.bfloat16):
            out = model(
                input_ids=batch.masked_fill(hidden, UNK),
                labels=batch,
                output_router_logits=True,
            )
        # The model's own loss has transformers' balancing term, which pools the layers.
        loss = out.loss - model.router_aux_loss_coef * out.aux_loss
        (loss + BALANCE * balance_loss(out.router_logits)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        step, seconds = step + 1, time.monotonic() - begin
        done = step / args.steps if args.steps else seconds / 60 / args.minutes
        if step % EVAL_EVERY_STEPS == 0 or done >= 1:
            report = measure(model, held_out)
            print(f"{min(done, 1):.0%}, step {step}: {report}", file=sys.stderr)
            curve.append([step, round(loss.item(), 3), report["loss"]])
            if report["loss"] < best["loss"]:
                weights = {k: v.clone() for k, v in model.state_dict().items()}
                best = {"step": step, "loss": report["loss"], "weights": weights}
    model.load_state_dict(best["weights"])
    return {
        "steps": step,
        "best_step": best["step"],
        "minutes": round(seconds / 60, 1),
        "tokens_per_s": round(step * BATCH * WINDOW / seconds),
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="stories, separated by one newline")
    parser.add_argument("--valid", type=Path, required=True, help="text to report on")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=60, help="default: 60")
    length.add_argument("--steps", type=int, help="instead: exact, so repeatable")
    parser.add_argument("--activation", default="silu", help="of the experts")
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

    model = make_model(args.activation)
    add_dropout(model)
    trained = train(model, stream, held_out, args)

    # Report on the weights as they are written: rounded to float16, used in float32.
    model.half().float()
    valid = encode(tokenizer, [args.valid.read_text()])
    report = {
        **measure(model, valid),
        "held_out": measure(model, held_out),
        "training": measure(model, stream[: len(held_out)]),
        "parameters": sum(p.numel() for p in model.parameters()),
        **trained,
        "text": hashlib.sha256(text.encode()).hexdigest()[:16],
        "seed": args.seed,
    }
    save(model, tokenizer, args.out)
    # mlx-lm knows these under the names that transformers 4 gave them.
    path = args.out / "config.json"
    config = json.loads(path.read_text())
    config["num_experts"] = EXPERTS
    config["rope_theta"] = model.config.rope_parameters["rope_theta"]
    path.write_text(json.dumps(config, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
