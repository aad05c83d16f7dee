"""Tell what a model thinks from what it answers."""

from collections.abc import Iterator
from dataclasses import dataclass

from .stop_texts import StopTexts

START, END = "<think>", "</think>"


@dataclass(frozen=True)
class Piece:
    """Some text of an answer, and whether it is a thought before the answer proper."""

    text: str
    thinking: bool = False


class Thinking:
    """Takes an answer piece by piece, and gives thoughts and the rest apart.

    The marks around thoughts are in neither.

    Args:
        tokenizer: mlx-lm's wrapper, which knows the model's marks.
        prompt: The prompt's text: some templates begin the thought themselves.
    """

    def __init__(self, tokenizer, prompt: str = ""):
        start = getattr(tokenizer, "think_start", None) or START
        end = getattr(tokenizer, "think_end", None) or END
        self._marks = {False: start.strip(), True: end.strip()}
        self._thinking = prompt.rstrip().endswith(self._marks[False])
        self._until = StopTexts([self._marks[self._thinking]])

    def take(self, piece: str, last: bool = False) -> Iterator[Piece]:
        """What may be shown after `piece`; all of it if it is the last one."""
        while True:
            if text := self._until.take(piece, last):
                yield Piece(text, self._thinking)
            if self._until.found is None:
                return
            piece = self._until.rest
            self._thinking = not self._thinking
            self._until = StopTexts([self._marks[self._thinking]])
