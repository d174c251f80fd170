"""Errors that the user can mend."""


class UserError(ValueError):
    """Wrong input from the user: one line that names the cause and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """
