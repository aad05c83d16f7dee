"""What a user can mend is a `FlashError`; anything else is our own mistake."""


def printable(text: str) -> str:
    """`text` in one line that no terminal takes for a command.

    Names in a model's files may hold escape sequences, and quoted errors line ends.
    """
    shown = (c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    return "".join(shown)


class FlashError(Exception):
    """Something the user can fix, said in one line: what was found, where, what to do.

    The command line prints it without a traceback and ends with exit code 1.
    """

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


def reason_of(error: Exception) -> str:
    """What another library's error says, short enough to be quoted in a line."""
    return printable(str(error))[:300] or type(error).__name__


class NotEnoughMemory(FlashError):
    """A budget too small for a model.

    Attributes:
        least_bytes: The smallest budget that works.
    """

    def __init__(self, message: str, least_bytes: int):
        super().__init__(message)
        self.least_bytes = least_bytes
