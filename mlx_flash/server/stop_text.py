"""Where an answer ends, by its text."""


class StopText:
    """Finds the text that has to end an answer, however it lies in tokens.

    Attributes:
        found: The stop text that was found, None so far.
    """

    def __init__(self, words: tuple[str, ...]):
        self.found: str | None = None
        self._words = words
        self._held = ""

    def cut(self, piece: str) -> str:
        """What can be told of the answer now that `piece` came.

        The beginning of a possible stop text is held back; nothing follows a stop text.
        """
        text = self._held + piece
        self._held = ""
        ends = [(text.find(w), -len(w), w) for w in self._words if w in text]
        if ends:
            start, _, self.found = min(ends)
            return text[:start]
        keep = max((_overlap(text, word) for word in self._words), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, word: str) -> int:
    """How many characters at the end of `text` may begin `word`."""
    for n in range(min(len(word) - 1, len(text)), 0, -1):
        if text.endswith(word[:n]):
            return n
    return 0
