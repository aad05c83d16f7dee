"""How a token is chosen and where an answer ends: options of `generate` and `chat`."""

from dataclasses import dataclass
from typing import Any

import click

from ..errors import FlashError
from .gathered import gathered


class Within(click.FloatRange):
    """A range of numbers; click lets `nan` through."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value!r} is no number.", param, ctx)
        return number


CONTEXT_SIZE = 20  # tokens that a penalty looks back on, as in mlx-lm
PENALTY = Within(-100, 100)
SHARE = Within(0, 1)


@dataclass(frozen=True)
class SamplingOptions:
    """The options by mlx-lm's names."""

    temp: float
    top_p: float
    top_k: int
    min_p: float
    min_tokens_to_keep: int
    xtc_probability: float
    xtc_threshold: float
    repetition_penalty: float | None
    repetition_context_size: int
    presence_penalty: float | None
    presence_context_size: int
    frequency_penalty: float | None
    frequency_context_size: int
    seed: int | None
    stop: tuple[str, ...]
    extra_eos_token: tuple[str, ...]

    def prepare(self, tokenizer: Any) -> None:
        """Have the tokenizer know the tokens that end an answer.

        Raises:
            FlashError: If one of them is no token.
        """
        known = tokenizer.get_vocab()
        for token in self.extra_eos_token:
            if token not in known and not token.isdecimal():
                raise FlashError(
                    f"--extra-eos-token {token!r} is no token of this model. Name one "
                    "of its tokens or its number; a text is for --stop."
                )
            tokenizer.add_eos_token(token if token not in known else str(known[token]))

    def arguments(self, tokenizer: Any, vocabulary: int) -> dict[str, Any]:
        """Seed MLX, and give the keywords for `stream_generate`.

        To be called when the model is there: making one draws numbers, too.

        Args:
            vocabulary: Tokens that the model knows: to choose among the first so many
                of them is to choose among all.
        """
        import mlx.core as mx
        from mlx_lm.sample_utils import make_logits_processors, make_sampler

        if self.seed is not None:
            mx.random.seed(self.seed)
        newline = tokenizer.encode("\n", add_special_tokens=False)
        sampler = make_sampler(
            self.temp,
            self.top_p if self.top_p < 1 else 0.0,
            self.min_p,
            min(self.min_tokens_to_keep, vocabulary),
            self.top_k if self.top_k < vocabulary else 0,
            self.xtc_probability,
            self.xtc_threshold,
            [*newline, *tokenizer.eos_token_ids],
        )
        processors = make_logits_processors(
            repetition_penalty=self.repetition_penalty,
            repetition_context_size=self.repetition_context_size,
            presence_penalty=self.presence_penalty,
            presence_context_size=self.presence_context_size,
            frequency_penalty=self.frequency_penalty,
            frequency_context_size=self.frequency_context_size,
        )
        return {"sampler": sampler, "logits_processors": processors, "stop": self.stop}


def _context_size(kind: str) -> Any:
    return click.option(
        f"--{kind}-context-size",
        type=click.IntRange(1),
        default=CONTEXT_SIZE,
        show_default=True,
        metavar="TOKENS",
        help=f"Tokens that --{kind}-penalty looks back on.",
    )


sampling_options = gathered(
    "sampling",
    SamplingOptions,
    [
        click.option(
            "--temp",
            type=Within(0, 100),
            default=0.0,
            show_default=True,
            help="Sampling temperature; at 0 always the likeliest token.",
        ),
        click.option(
            "--top-p",
            type=Within(0, 1, min_open=True),
            default=1.0,
            show_default=True,
            help="Nucleus sampling.",
        ),
        click.option(
            "--top-k",
            type=click.IntRange(0),
            default=0,
            show_default=True,
            help="Choose among the so many likeliest tokens; 0 among all.",
        ),
        click.option(
            "--min-p",
            type=SHARE,
            default=0.0,
            show_default=True,
            help="Leave out tokens below this share of the likeliest one.",
        ),
        click.option(
            "--min-tokens-to-keep",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="Tokens that --min-p leaves at least.",
        ),
        click.option(
            "--xtc-probability",
            type=SHARE,
            default=0.0,
            show_default=True,
            help="How often the likeliest tokens are left out (XTC sampling).",
        ),
        click.option(
            "--xtc-threshold",
            type=Within(0, 0.5),
            default=0.1,
            show_default=True,
            help="XTC leaves out all above this probability but the last of them.",
        ),
        click.option(
            "--repetition-penalty",
            type=Within(0, 100, min_open=True),
            help="Divide the logits of tokens that were there by this.  [default: 1]",
        ),
        _context_size("repetition"),
        click.option(
            "--presence-penalty",
            type=PENALTY,
            help="Take this from the logits of tokens that were there.  [default: 0]",
        ),
        _context_size("presence"),
        click.option(
            "--frequency-penalty",
            type=PENALTY,
            help="The same for each time that they were there.  [default: 0]",
        ),
        _context_size("frequency"),
        click.option(
            "--seed", type=click.IntRange(0, 2**64 - 1), help="Seed of the sampling."
        ),
        click.option(
            "--stop",
            multiple=True,
            metavar="TEXT",
            help="End the answer before this text. Repeatable.",
        ),
        click.option(
            "--extra-eos-token",
            multiple=True,
            metavar="TOKEN",
            help="A token, or its number, that ends the answer too. Repeatable.",
        ),
    ],
)
