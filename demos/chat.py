"""Talk with a model of which only a part is in memory.

    mlx-flash convert SmolLM2-135M-Instruct -o smollm2-flash
    python demos/chat.py smollm2-flash --memory 60%

Each turn has the new tokens read alone: `Conversation` keeps the KV cache of the turns
before. (`mlx-flash chat` does the same with editing, commands and Ctrl-C.)
"""

import argparse

import mlx_flash


def main() -> None:
    parser = argparse.ArgumentParser(description="Talk with a model.")
    parser.add_argument("model", help="flash folder, or a mixture of experts")
    parser.add_argument("--memory", default="50%", help="7GB, 512MB, 50%% or auto")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer")
    args = parser.parse_args()

    with mlx_flash.load(args.model, memory=args.memory) as (model, tokenizer):
        talk = mlx_flash.Conversation(model, tokenizer, max_tokens=args.tokens)
        while question := _ask():
            for piece in talk.ask(question):
                print(piece.text, end="", flush=True)
            report = model.flash.report()
            print(
                f"\n({report.prompt_tokens} tokens were read, "
                f"{talk.cached_tokens} were known, {report.generation_tokens} are new)"
            )


def _ask() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


if __name__ == "__main__":
    main()
