"""What a user can mend is a `FlashError`; anything else is our own mistake."""


class FlashError(Exception):
    """Something the user can fix, said in one line: what was found, where, what to do.

    The command line prints it without a traceback and ends with exit code 1.
    """
