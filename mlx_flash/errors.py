"""What a user can mend is a `FlashError`; anything else is our own mistake."""


class FlashError(Exception):
    """Something the user can fix, said in one line: what was found, where, what to do.

    The command line prints it without a traceback and ends with exit code 1.
    """


class NotEnoughMemory(FlashError):
    """A budget too small for a model.

    Attributes:
        least_bytes: The smallest budget that works.
    """

    def __init__(self, message: str, least_bytes: int):
        super().__init__(message)
        self.least_bytes = least_bytes
