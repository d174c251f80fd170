"""Errors that the user can mend."""


class UserError(ValueError):
    """Wrong input from the user: one line that names the cause and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


def one_line(error: BaseException) -> str:
    """Somebody else's error, to be quoted in a UserError."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
