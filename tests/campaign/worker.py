"""Loads damaged folders, one a line of stdin, and says in a line what came of each.

Run as a process of its own: a folder may end it, stop it or take all of its memory.
"""

import hashlib
import json
import os
import resource
import sys
import traceback
from pathlib import Path

import mlx.core as mx
import numpy as np

import mlx_flash
from mlx_flash.errors import FlashError
from mlx_flash.planning.info import look_at

MEMORY = "1GB"  # as the model is small: of this it takes what it needs
MAX_BYTES = 4 << 30  # of address space beyond what the libraries have taken
TEXT = "w5 w17"
TOKENS = [[5, 17]]


def load(folder: Path, check: str):
    return mlx_flash.load(folder, MEMORY, native=False, check=check)


def is_noticed(folder: Path) -> bool:
    """Whether the folder is refused as it is loaded by default."""
    try:
        with load(folder, "sample"):
            return False
    except FlashError:
        return True


def judge(folder: Path) -> dict:
    """What becomes of a folder: {"kind": "clean" | "answer" | "traceback", …}.

    Digests are left out at first: what they would notice is tried, too. `noticed` says
    of an answer whether they notice.
    """
    try:
        if (folder / "flash.json").exists():
            look_at(folder).layers().markdown()
        with load(folder, "none") as (model, tokenizer):
            logits = model(mx.array(TOKENS)).astype(mx.float32)
            mx.eval(logits)
            words = mlx_flash.generate(model, tokenizer, TEXT, max_tokens=2)
        digest = hashlib.sha256(np.array(logits).tobytes()).hexdigest()
        answer = {"kind": "answer", "digest": digest, "words": words}
        return answer | {"noticed": is_noticed(folder)}
    except FlashError as error:
        if not str(error).isprintable():
            return {"kind": "traceback", "text": f"not one line: {str(error)!r}"}
        return {"kind": "clean", "text": str(error)}
    except BaseException:
        return {"kind": "traceback", "text": traceback.format_exc()}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some libraries print what they think of a folder
    for line in sys.stdin:
        print(json.dumps(judge(Path(json.loads(line)))), file=answers, flush=True)


if __name__ == "__main__":
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (taken + MAX_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
