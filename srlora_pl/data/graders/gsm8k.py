"""Answers to GSM8K's questions (Cobbe et al., 2021, arXiv:2110.14168), read as MetaMath does (arXiv:2309.12284)."""

import math
import re

from srlora_pl.data.graders.base import Grade, behind_phrase
from srlora_pl.util.errors import UserError, shortened

_NUMBER = re.compile(r"[-+]?\d*[.,/]?\d+")


class GSM8K:
    """The first number behind the last ``The answer is: ``, rounded, must be the reference's.

    A number has at most one comma, point or slash: 1,234 and 3/4, but of 1,234,567 it is 1,234. A fraction is divided,
    unless its denominator is 0. Halves are rounded to the even number. The reference's number stands behind
    ``#### ``, or is the whole reference.
    """

    def grade(self, text: str, reference: str) -> Grade:
        gold, number = _gold(reference), _number(behind_phrase(text) or "")
        return Grade(number == gold, None if number is None else str(number))


def _gold(reference: str) -> int:
    number = reference.rpartition("#### ")[2].partition("\n")[0]
    try:
        return int(number.replace(",", ""))
    except ValueError:
        raise UserError(
            f"the grader gsm8k finds no whole number in the reference {shortened(reference)}: write one behind "
            "'#### ', or name another grader"
        ) from None


def _number(answer: str) -> int | None:
    match = _NUMBER.search(answer)
    if not match or match[0].lstrip("+-").startswith("/"):
        return None
    above, _, below = match[0].replace(",", "").partition("/")
    value = float(above) / (float(below or 1) or 1)
    return round(value) if math.isfinite(value) else None
