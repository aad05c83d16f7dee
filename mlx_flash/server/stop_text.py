"""Where an answer ends, by its text."""


class StopText:
    """Finds where an answer has to end.

    mlx-lm looks for the tokens of a stop text, and the model may write it with others.
    Its handler takes the text itself out, and drops the text of the last token: so the
    answer ends with the token after the one that completes a stop text.

    Attributes:
        found: Whether the text so far has one.
    """

    def __init__(self, words: list[str]):
        self.found = False
        self._words = words
        self._keep = max(map(len, words), default=1) - 1
        self._tail = ""

    def cut(self, piece: str) -> str:
        """The next piece of the answer, up to the end of a stop text in it."""
        text = self._tail + piece
        ends = [text.find(word) + len(word) for word in self._words if word in text]
        self.found = bool(ends)
        self._tail = text[max(len(text) - self._keep, 0) :]
        return piece[: len(piece) - len(text) + min(ends)] if ends else piece
