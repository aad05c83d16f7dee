"""Where an answer ends by its text, and what of it may be shown meanwhile."""

from collections.abc import Sequence


class StopTexts:
    """Takes an answer piece by piece and gives out what comes before a stop text.

    What may be the beginning of one is held back until the next piece decides.

    Attributes:
        found: The stop text that ended the answer, None as long as there is none.
        rest: What came after it in the same piece.
    """

    def __init__(self, words: Sequence[str]):
        self.found: str | None = None
        self.rest = ""
        self._words = [word for word in words if word]
        self._held = ""

    def take(self, piece: str, last: bool = False) -> str:
        """What may be shown after `piece`; all of it if it is the last one."""
        if self.found is not None:
            return ""
        text = self._held + piece
        ends = [(text.find(word), word) for word in self._words if word in text]
        if ends:
            at, self.found = min(ends)
            self._held, self.rest = "", text[at + len(self.found) :]
            return text[:at]
        keep = 0 if last else self._begun(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _begun(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop text begins."""
        most = max((len(word) - 1 for word in self._words), default=0)
        for length in range(min(most, len(text)), 0, -1):
            if any(word.startswith(text[-length:]) for word in self._words):
                return length
        return 0
