"""A tiny random model of experts with a chat template that knows tools and thinking."""

import contextlib
from unittest import mock

import mlx.core as mx
from stock_checkpoints import QWEN3, write_checkpoint

from mlx_flash.server.answering import Answering

CALL = '{"name":"add","arguments":{"a":3,"b":[4]}}'
BROKEN = '{"name":"add",'
WORDS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    CALL,
    BROKEN,
    "user",
    ":",
)
TEMPLATE = (
    "{% if tools %}w90 {% endif %}{% for m in messages %}{{ m.role }} : "
    "{{ m.content }} {% for tool_call in m.tool_calls or [] %}<tool_call> w"
    "{{ tool_call.function.arguments.a }} {{ tool_call.name }}{% endfor %}{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking == 'now' %}<think>{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
    }
]


def write_chat_model(folder):
    """The checkpoint, and its tokenizer: `w3` is token 3, the last ones are `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = write_checkpoint(folder, QWEN3)
    vocab = {"<unk>": 0, "<pad>": 1, "</s>": 2}
    vocab |= {f"w{i}": i for i in range(3, 97 - len(WORDS))}
    vocab |= {word: 97 - len(WORDS) + i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(made)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


@contextlib.contextmanager
def saying(tokenizer, text):
    """Have every answer be this text, whatever the model thinks of it."""
    tokens = tokenizer.encode(text) + [2]

    def sampler(self, asked):
        left = iter(tokens)
        return lambda logprobs: mx.array([next(left, 2)])

    with mock.patch.object(Answering, "_sampler", sampler):
        yield
