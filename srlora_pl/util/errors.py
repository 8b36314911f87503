"""Errors that a user can cause, and the helper that finds the nearest right name."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any


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


START_AGAIN = "and start again, fit with --ckpt_path last"
# A worker's death reaches the main process in several ways.
WORKER_DIED = (
    "a process that loads data died, killed perhaps for want of memory: lower data.num_workers or data.batch_size, "
    + START_AGAIN
)


def require(key: str, value: Any, condition: str, holds: bool) -> None:
    """Refuse the ``value`` that a user gave to the setting ``key`` unless the ``condition`` holds."""
    if not holds:
        raise UserError(f"{key} is {value!r}: it must be {condition}.")


def require_one_of(key: str, value: str, known: Iterable[str]) -> None:
    """Refuse the ``value`` of the setting ``key`` unless it is one of ``known``."""
    if value not in (names := list(known)):
        raise UserError(f"{key} is {value!r}{did_you_mean(str(value), names)}: it must be one of {listed(names)}.")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` and, one after the other, what brought it about."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest of ``known``, or an empty string when nothing is near.

    Capitals and spaces around a name make no difference here.
    """
    plain = {each.strip().casefold(): each for each in known}
    near = get_close_matches(name.strip().casefold(), plain, n=1)
    return f" (did you mean {plain[near[0]]!r}?)" if near else ""


def listed(names: Iterable[Any], most: int | None = None) -> str:
    """``a, b, c``, in one line whatever the names hold; ``a, b and 7 more`` where there are more than ``most``."""
    every = [str(name) for name in names]
    more = f" and {len(every) - most} more" if most is not None and len(every) > most else ""
    return " ".join(", ".join(every[:most]).split()) + more


def shortened(value: Any) -> str:
    """A value as Python writes it, its first 40 letters at most."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def one_line(error: BaseException) -> str:
    """What the first line of a library's error says, as a part of a sentence."""
    first = " ".join(str(error).strip().partition("\n")[0].split())
    return first[:200].rstrip(".:") or type(error).__name__


def is_utf8(name: str) -> bool:
    """Whether a name, of a file for example, can be written into a text; other bytes are surrogates in it."""
    return name.encode(errors="ignore").decode() == name
