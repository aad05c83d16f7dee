"""The tokenizer of a folder, which may be another model's, or somebody's program."""

from pathlib import Path
from typing import Any

from ..errors import FlashError, printable
from .config import read_config


def load_tokenizer(
    folder: Path, trust_remote_code: bool = False, chat_template: str | None = None
):
    """The folder's tokenizer in mlx-lm's wrapper.

    Args:
        trust_remote_code: Whether it may be code that the folder brings.
        chat_template: In the place of the folder's own. By it mlx-lm knows how the
            model writes calls of tools.

    Raises:
        FlashError: If there is none or it cannot be read.
    """
    from mlx_lm.utils import load_tokenizer as load_wrapped

    config = read_config(folder)
    try:
        # transformers makes an empty tokenizer of a folder that has none.
        if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
            raise ValueError("no tokenizer* or vocab* file")
        # If this were not said, transformers would ask at the terminal.
        extra: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if chat_template is not None:
            extra["chat_template"] = chat_template
        return load_wrapped(folder, extra, eos_token_ids=config.get("eos_token_id"))
    except (KeyboardInterrupt, SystemExit):
        raise
    # Whatever transformers raises, and the panics of its Rust, which are no Exception.
    except BaseException as error:
        lines = str(error).strip().splitlines()
        reason = printable(lines[0])[:300] if lines else type(error).__name__
        raise FlashError(
            f"{folder} has no usable tokenizer ({reason}). Copy the files of the "
            "original checkpoint (tokenizer.json, tokenizer_config.json, …) into it."
        ) from error


def check_vocabulary(tokenizer, folder: Path, vocabulary: int) -> None:
    """Refuse another model's tokenizer: MLX reads foreign memory for its tokens.

    Tokens that were added later are left to `stream_generate`: many a sound checkpoint
    has one, for padding, that its model does not know.

    Args:
        vocabulary: Tokens that the model knows.
    """
    ids = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        raise FlashError(
            f"{folder}: its tokenizer has token {max(ids):,}, its model knows "
            f"{vocabulary:,} tokens. Copy the tokenizer files of the original "
            "checkpoint into it."
        )
