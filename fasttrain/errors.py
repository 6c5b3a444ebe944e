"""The exceptions that are meant for the user."""


class UserError(Exception):
    """A mistake that the user can fix, explained in one line.

    The message names the file or flag, what is wrong, what was expected, and what to do. The command line
    prints it without a traceback and exits with status 2.
    """


class DivergedError(UserError):
    """The loss or a weight has become NaN or infinite."""


class WriteError(UserError):
    """A file cannot be written: the disk is full, read-only or broken."""


class LostRankError(UserError):
    """Another rank of a training on several has ended, or does not answer."""


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP ended the command; the message is for the user.

    status: the exit status that shells use for this signal: 130, 143 or 129.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum, self.status = signum, 128 + signum


class TrainingInterrupted(Interrupted):
    """A signal ended a training on every rank, after its state was saved; the message says how to resume."""


def one_line(error: BaseException) -> str:
    """Return an exception's message as one line of at most 200 characters, or its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"
