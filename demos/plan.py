"""Ask how fast a model would be with more or less memory, before it is downloaded.

    python demos/plan.py mlx-community/Qwen3-30B-A3B-4bit 6GB 8GB 12GB

Only the configuration is read. Times are modelled from what `mlx-flash probe` measured
here, or for the M1 Max of the paper "LLM in a flash" where nothing was measured yet.
"""

import argparse

from mlx_flash import DEMO_MODEL, FlashError
from mlx_flash.planning.plan import make_plan
from mlx_flash.profile import load_profile


def main() -> None:
    parser = argparse.ArgumentParser(description="Plan a model.")
    parser.add_argument("model", nargs="?", default=DEMO_MODEL)
    parser.add_argument("memory", nargs="*", default=["50%", "70%", "100%"])
    args = parser.parse_args()

    profile = load_profile() or load_profile("m1-max-paper")
    print(f"{args.model} on {profile.device}, modelled:")
    print("memory    held in memory    MB read per token    tokens/s")
    for memory in args.memory:
        try:
            plan = make_plan(args.model, memory, profile)
        except FlashError as error:
            print(f"{memory:<8}  {error}")
            continue
        # At best and at worst: how many units are found in memory is not known.
        megabytes = " to ".join(f"{b / 1e6:,.1f}" for b in plan.bytes_per_token)
        speed = " to ".join(f"{s:,.1f}" for s in plan.tokens_per_s)
        print(f"{memory:<8}  {plan.held_share:>14.0%}    {megabytes:>17}    {speed}")


if __name__ == "__main__":
    main()
