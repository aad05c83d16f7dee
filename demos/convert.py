"""Convert a checkpoint, and compare the result with the model it was made of.

    python demos/convert.py facebook/opt-125m opt-125m-flash

Converting cuts each FFN into units (neurons, experts or blocks) and writes a unit's
weights side by side, so that one read brings all of them. Nothing is rounded: without
predictors the logits are those of mlx-lm up to the order of summation.
"""

import argparse
from pathlib import Path

import mlx.core as mx

import mlx_flash


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a checkpoint.")
    parser.add_argument("checkpoint", help="folder, or a name on the Hugging Face hub")
    parser.add_argument("output", type=Path)
    parser.add_argument("--memory", default="70%", help="for the comparison")
    args = parser.parse_args()

    folder = mlx_flash.convert(args.checkpoint, args.output)
    tokens = mx.array([[5, 6, 7, 8]])
    logits = {}
    for memory in (args.memory, "200%"):  # the second holds everything
        loaded = mlx_flash.load_model(folder, memory, predictor=False, context=64)
        with loaded as (model, _):
            logits[memory] = model(tokens).astype(mx.float32)
            mx.eval(logits[memory])
            manifest, read = model.flash.manifest, model.flash.stats.bytes_read
        print(f"{memory} of memory: {read / 1e6:.2f} MB read for {tokens.size} tokens")
    difference = mx.abs(logits[args.memory] - logits["200%"]).max().item()
    print(
        f"{folder}: {len(manifest.layers)} layers of {manifest.layers[0].units:,} "
        f"{manifest.unit}s; the logits differ by {difference:.1e} at most."
    )


if __name__ == "__main__":
    main()
