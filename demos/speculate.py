"""How much a draft saves that is right so often.

    python demos/speculate.py --right 0.7 --num-draft-tokens 6

SYNTHETIC: the model is a Llama with random weights, in blocks. The draft knows what the
model will say, as a small model of its family might, and is wrong at random. A model in
blocks reads the same for one token as for several, so every right guess saves a sweep.
What was guessed after a wrong guess is lost.
"""

import argparse
import random
import tempfile
from pathlib import Path

import mlx_flash
from mlx_flash.bench import synthetic, whole
from mlx_flash.layers.kinds import BLOCK

PROMPT = list(range(5, 37))


class Draft:
    """Says what the model will say, but for some tokens."""

    def __init__(self, answer: list[int], right: float):
        self.answer, self.right, self.random = answer, right, random.Random(0)

    def draft(self, known, most):
        said = len(known) - len(PROMPT)
        guesses = self.answer[said : said + most]
        return [t if self.random.random() < self.right else 3 for t in guesses]


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode with and without a draft.")
    parser.add_argument("--right", type=float, default=0.7, help="of its tokens")
    parser.add_argument("--num-draft-tokens", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--memory", default="50%")
    args = parser.parse_args()

    heads = args.width // 64
    changes = {
        "hidden_size": args.width,
        "intermediate_size": 4 * args.width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    with tempfile.TemporaryDirectory() as work:
        source, folder = Path(work) / "random", Path(work) / "flash"
        make = synthetic.plain_weights("float32")
        synthetic.write_checkpoint(source, whole.MODELS[BLOCK] | changes, make)
        mlx_flash.convert(source, folder, unit="block", progress=False)
        with mlx_flash.load(folder, args.memory, page_cache="off") as both:
            compare(*both, args)


def compare(model, tokenizer, args: argparse.Namespace) -> None:
    tokenizer.eos_token_ids = set()  # answers of a known length
    answer: list[int] = []
    kinds = {
        "without drafts": {},
        f"right {args.right:.0%}": {"draft_model": Draft(answer, args.right)},
    }
    options = {"max_tokens": args.tokens, "num_draft_tokens": args.num_draft_tokens}
    for name, drafts in kinds.items():
        mlx_flash.generate(model, tokenizer, PROMPT, **options, **drafts)
        tokens, report = model.flash.run.tokens, model.flash.report()
        answer += [] if answer else tokens
        print(
            f"{name}: {report.bytes_per_token / 1e6:.1f} MB per token, "
            f"{report.tokens_per_call or 1:.2f} tokens per call, "
            f"{report.tokens_per_s:.2f} tokens/s, "
            f"{'the same' if tokens == answer else 'ANOTHER'} text"
        )


if __name__ == "__main__":
    main()
