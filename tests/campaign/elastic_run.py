"""A run that gives way to another process; what it did is printed as JSON.

    elastic_run.py FOLDER MEMORY TOKENS

Prints "began" when the first token is there. Ends after TOKENS tokens, or when memory
was given and all of it was taken back. The other process stands in the same cgroup.
"""

import json
import sys

import mlx_flash

PROMPT = [5, 9, 33]


def main(folder: str, memory: str, tokens: str) -> None:
    found = []
    with mlx_flash.load(folder, memory, context=1024) as (model, tokenizer):
        tokenizer.eos_token_ids = set()
        usual = model.flash.budget.total_bytes
        steps = mlx_flash.stream_generate(model, tokenizer, PROMPT, int(tokens))
        for response in steps:
            found.append(response.token)
            if len(found) == 1:
                print("began", flush=True)
            if model.flash.resized and model.flash.budget.total_bytes == usual:
                break
        report = model.flash.report()
    facts = report.to_dict() | {"tokens": found, "usual": usual, "said": str(report)}
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
