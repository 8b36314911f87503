"""What a grader is."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Grade:
    """The verdict on a generated text.

    Attributes:
        answer: what was read as the answer, None if the text holds none.
    """

    correct: bool
    answer: str | None


class Grader(Protocol):
    """Reads the answer in a generated text, and holds it against the reference."""

    def grade(self, text: str, reference: str) -> Grade:
        """Grade ``text``, as `cut` at the stop words.

        Raises:
            UserError: ``reference`` is none for this grader, whatever the text.
        """
        ...


def cut(text: str, stop: Iterable[str]) -> str:
    """``text`` up to the first of the ``stop`` words in it."""
    return text[: min((place for word in stop if (place := text.find(word)) >= 0), default=len(text))]


def behind_phrase(text: str) -> str | None:
    """What follows the last ``The answer is: ``, by which MetaMathQA's responses end, or None."""
    _, phrase, answer = text.rpartition("The answer is: ")
    return answer if phrase else None
