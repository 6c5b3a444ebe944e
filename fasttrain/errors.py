"""The one exception that a user is meant to see."""


class UserError(Exception):
    """A mistake that the user can mend, said in one line.

    The message names the file or flag, says what was expected and what to do. The command line prints it
    without a traceback and exits with status 2.
    """
