"""Continue a text with a model of which only a part is in memory.

    python demos/generate.py "Once upon a time"
    python demos/generate.py "Once upon a time" --model opt-6.7b-flash --memory 7GB

The tokens come from mlx-lm's own loop. While it runs, `model.flash.stats` counts what
was found in memory and what came from flash.
"""

import argparse

from mlx_lm.sample_utils import make_sampler

import mlx_flash


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue a text.")
    parser.add_argument("prompt")
    parser.add_argument("--model", default=mlx_flash.DEMO_MODEL, help="flash folder")
    parser.add_argument("--memory", default="50%", help="7GB, 512MB, 50%% or auto")
    parser.add_argument("--tokens", type=int, default=60)
    args = parser.parse_args()

    # The less context, the more memory is left for neurons.
    with mlx_flash.load(args.model, memory=args.memory, context=args.tokens + 64) as (
        model,
        tokenizer,
    ):
        print(args.prompt, end="")
        for step in mlx_flash.stream_generate(
            model,
            tokenizer,
            args.prompt,
            max_tokens=args.tokens,
            sampler=make_sampler(temp=0.7),
        ):
            print(step.text, end="", flush=True)
        stats = model.flash.stats
        print(
            f"\n\n{stats.hits:,} {model.flash.manifest.unit}s were in memory, "
            f"{stats.misses:,} came from flash: {stats.bytes_read / 1e6:,.1f} MB "
            f"in {stats.reads:,} reads."
        )


if __name__ == "__main__":
    main()
