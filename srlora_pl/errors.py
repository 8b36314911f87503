"""Errors that a user can cause, and the helper that finds the nearest right name."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something in the user's input or set-up is wrong.

    The message is one sentence that names the value, the place and the mend; the command line prints it
    without a traceback and exits with 2.
    """


class Interrupted(SystemExit):
    """A signal ended the run; the command line prints the message and exits with 128 + the signal's number."""

    code: int

    def __init__(self, message: str, code: int) -> None:
        super().__init__(code)
        self.message = message


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest of ``known``, or an empty string when nothing is near."""
    near = get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
