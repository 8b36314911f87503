"""Answers to the problems of MATH (Hendrycks et al., 2021, arXiv:2103.03874), read as MetaMath does (2309.12284)."""

from collections.abc import Callable

from srlora_pl.data.graders import hendrycks
from srlora_pl.data.graders.base import Grade, behind_phrase
from srlora_pl.util.errors import require_one_of
from srlora_pl.util.program import require_extra


class Math:
    r"""What stands behind the last ``The answer is: ``, up to a full stop, must equal the reference's ``\boxed{...}``.

    A reference without a box is an answer itself.

    Args:
        math_grader: ``hendrycks`` compares normalised strings, and is the one to publish. ``math_verify`` lets
            the package math-verify parse both, and tell whether one can be simplified into the other.

    Raises:
        UserError: ``math_grader`` is unknown or not installed.
    """

    def __init__(self, math_grader: str = "hendrycks") -> None:
        require_one_of("math_grader", math_grader, _EQUAL)
        if math_grader == "math_verify":
            require_extra("math", "math_verify", "math_grader math_verify")
        self._equal = _EQUAL[math_grader]

    def grade(self, text: str, reference: str) -> Grade:
        answer = _without_stop((behind_phrase(text) or "").partition(".\n")[0])
        gold = hendrycks.boxed(reference)
        correct = bool(answer) and self._equal(answer, _without_stop(reference if gold is None else gold))
        return Grade(correct, answer or None)


def _without_stop(answer: str) -> str:
    """Of one gold answer of MATH too, which could not be given otherwise."""
    return answer.strip().removesuffix(".").strip()


def _verified(answer: str, gold: str) -> bool:
    from math_verify import parse, verify  # it brings sympy, which takes a second to import

    return verify(parse(f"${gold}$"), parse(f"${answer}$"))


_EQUAL: dict[str, Callable[[str, str], bool]] = {"hendrycks": hendrycks.equal, "math_verify": _verified}
