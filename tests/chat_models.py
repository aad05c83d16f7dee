"""Tiny models with a chat template, whose tokens can be read as words."""

import json
import shutil
from pathlib import Path

from conftest import save_tokenizer
from stock_checkpoints import LLAMA, write_checkpoint

import mlx_flash
from mlx_flash.layers import block

# w10 system, w11 user, w12 assistant, w13 the end of a message
ROLES = {"system": "w10", "user": "w11", "assistant": "w12"}
END = "w13"
TEMPLATE = (
    "{% for m in messages %}"
    "{{ {'system': 'w10', 'user': 'w11', 'assistant': 'w12'}[m.role] }} "
    "{{ m.content }} w13 {% endfor %}"
    "{% if loud is defined and loud %}w14 {% endif %}"
    "{% if add_generation_prompt %}w12 {% endif %}"
)
MEMORY = "600KB"


def expected_prompt(*messages, goes_on=False):
    """Token ids of (role, words) pairs as the template writes them."""
    words = []
    for role, content in messages:
        words += [ROLES[role], *content.split(), END]
    words = words[:-1] if goes_on else [*words, ROLES["assistant"]]
    return [int(word[1:]) for word in words]


def write_template(folder: Path, template: str = TEMPLATE) -> None:
    """Give a folder's tokenizer a chat template."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"chat_template": template}))


def make_chat_model(base: Path, template: str | None = TEMPLATE, **changes) -> Path:
    """A small Llama in blocks, on flash, below `base`."""
    stock = write_checkpoint(base / "stock", LLAMA | {"head_dim": 32} | changes)
    save_tokenizer(stock)
    if template is not None:
        write_template(stock, template)
    size, block.BLOCK_BYTES = block.BLOCK_BYTES, 16_000
    try:
        return mlx_flash.convert(stock, base / "flash", rank=0, progress=False)
    finally:
        block.BLOCK_BYTES = size


def with_template(folder: Path, copy: Path, template: str) -> Path:
    """A copy of a flash folder with another template; nothing is noted of it."""
    shutil.copytree(folder, copy)
    write_template(copy, template)
    return copy
