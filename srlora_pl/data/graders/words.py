"""Answers that are words: one of several options, or any text."""

import re
from collections.abc import Sequence

from srlora_pl.data.graders.base import Grade
from srlora_pl.util.errors import UserError, listed, shortened


class Options:
    """The first of the ``options`` in the text, in any letters and also inside of words, must be the reference.

    So LLM-Adapters reads answers to the questions of Commonsense170K (Hu et al., 2023, arXiv:2304.01933).
    """

    def __init__(self, options: Sequence[str]) -> None:
        if not options:
            raise UserError("the grader options needs the options: give their words, or name another grader")
        self._options = [option.lower() for option in options]
        longest_first = sorted(self._options, key=len, reverse=True)  # where one begins another
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def grade(self, text: str, reference: str) -> Grade:
        gold, found = reference.strip().lower(), self._pattern.search(text.lower())
        if gold not in self._options:
            raise UserError(
                f"the reference {shortened(reference)} is none of the grader's options {listed(self._options)}"
            )
        return Grade(found is not None and found[0] == gold, found and found[0])


class Exact:
    """The whole text must be the reference, blanks around them aside."""

    def grade(self, text: str, reference: str) -> Grade:
        answer = text.strip()
        return Grade(answer == reference.strip(), answer or None)
