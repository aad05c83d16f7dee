"""Options by the names that other programs have for them."""

import click

# What llama.cpp, Ollama, vLLM, transformers and mlx-lm's other commands call it → ours.
SAME = {
    "--temperature": "--temp",
    "--n-predict": "--max-tokens",
    "--num-predict": "--max-tokens",
    "--num_predict": "--max-tokens",
    "--predict": "--max-tokens",
    "--max-new-tokens": "--max-tokens",
    "--max_tokens": "--max-tokens",
    "--tokens": "--max-tokens",
    "-n": "--max-tokens",
    "--ctx-size": "--context",
    "--num-ctx": "--context",
    "--num_ctx": "--context",
    "--max-model-len": "--context",
    "--context-length": "--context",
    "-c": "--context",
    "--system": "--system-prompt",
    "-sys": "--system-prompt",
    "--top_k": "--top-k",
    "--top_p": "--top-p",
    "--min_p": "--min-p",
    "--repeat-penalty": "--repetition-penalty",
    "--repeat_penalty": "--repetition-penalty",
    "--repeat-last-n": "--repetition-context-size",
    "--xtc_probability": "--xtc-probability",
    "--reverse-prompt": "--stop",
    "--stop-sequence": "--stop",
    "--model-path": "--model",
    "--hf-repo": "--model",
    "-hf": "--model",
    "--lora": "--adapter-path",
    "--adapter": "--adapter-path",
    "--model-draft": "--draft-model",
    "-md": "--draft-model",
    "--draft": "--num-draft-tokens",
    "--draft-max": "--num-draft-tokens",
    "--cache-type-k": "--kv-bits",
    "--cache-type-v": "--kv-bits",
    "--prompt-cache-file": "--prompt-cache",
    "--chat-template-kwargs": "--chat-template-config",
    "--chat-template-args": "--chat-template-config",
    "--max-memory": "--memory",
    "--ram": "--memory",
    "--no-cnv": "--ignore-chat-template",
    "-no-cnv": "--ignore-chat-template",
    "--raw": "--ignore-chat-template",
}

OURS_ALONE = "MLX uses the whole machine, and --memory says what a model may hold."
# Names of what mlx-flash has nothing of → why.
NOTHING = {
    "--threads": f"There is none: {OURS_ALONE}",
    "-t": f"There is none: {OURS_ALONE}",
    "--num-thread": f"There is none: {OURS_ALONE}",
    "--n-gpu-layers": f"There is none: {OURS_ALONE}",
    "--gpu-layers": f"There is none: {OURS_ALONE}",
    "--num-gpu": f"There is none: {OURS_ALONE}",
    "-ngl": f"There is none: {OURS_ALONE}",
    "--mlock": f"There is none: {OURS_ALONE}",
    "--no-mmap": "There is none: --page-cache says how files are read.",
    "--use-default-chat-template": "There is none: mlx-lm has it without effect.",
    "--quantize-activations": "There is none: FFNs from flash multiply as mlx-lm's do.",
    "-qa": "There is none: FFNs from flash multiply as mlx-lm's do.",
    "--verbose": "There is none: figures are printed unless --quiet is given.",
    "--image": "There is none: mlx-flash reads text alone.",
    "--pipeline": "There is none: mlx-flash runs on one machine.",
}


def hint(error: click.NoSuchOption, args: list[str]) -> str | None:
    """A sentence for whoever typed another program's option; None if none is known.

    Args:
        args: As they were typed: click takes `-ngl` for `-n`.
    """
    name = error.option_name
    typed = [arg.split("=")[0] for arg in args]
    name = next((a for a in typed if a.startswith(name) and a in NOTHING | SAME), name)
    if name in NOTHING:
        return f"No such option: {name}. {NOTHING[name]}"
    ours = SAME.get(name)
    if ours is None or error.ctx is None:
        return None
    known = {flag for param in error.ctx.command.params for flag in param.opts}
    if ours in known:
        return f"No such option: {name}. mlx-flash calls it {ours}."
    if ours == "--context" and "--max-tokens" in known:
        return (
            f"No such option: {name}. There is none here: what the prompt and "
            "--max-tokens need is reserved."
        )
    return None
