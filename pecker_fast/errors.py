"""The errors that callers may want to tell apart; anything else is an ordinary ``ValueError`` or the like."""


class PeckerFastError(Exception):
    """Base class of the errors raised by this package alone."""


class PeckerFastWarning(UserWarning):
    """Something is done as it was asked for, and may have been meant otherwise (told on stderr by the command line)."""


class FileFormatError(PeckerFastError, ValueError):
    """A file or folder is missing, truncated, foreign or unwritable (exit code 3 of the command line)."""


class NonFiniteError(PeckerFastError, ValueError):
    """A loss, gradient or statistic became NaN or infinite (exit code 4 of the command line)."""


class OutOfTimeError(PeckerFastError):
    """A training ended at its time limit, before its last step (exit code 5 of the command line).

    Attributes:
        step: Steps that are done.
        model: What it would have returned had this been the end.
    """

    def __init__(self, message: str, step: int, model: object) -> None:
        super().__init__(message)
        self.step, self.model = step, model
