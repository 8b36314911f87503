"""Graders: from generated texts to right and wrong answers, in plain Python; torch is not imported here."""

from collections.abc import Callable, Sequence

from srlora_pl.data.graders.base import Grade, Grader, cut
from srlora_pl.data.graders.gsm8k import GSM8K
from srlora_pl.data.graders.maths import Math
from srlora_pl.data.graders.words import Exact, Options
from srlora_pl.util.errors import require_one_of

GRADERS = ("gsm8k", "math", "options", "exact")

__all__ = ["GRADERS", "Grade", "Grader", "cut", "grader"]


def grader(name: str, *, options: Sequence[str] = (), math_grader: str = "hendrycks") -> Grader:
    """The grader ``name``: gsm8k, math, options or exact.

    Args:
        options: of ``options``, the words to choose from.
        math_grader: of ``math``, ``hendrycks`` or ``math_verify``.

    Raises:
        UserError: the grader is unknown, or lacks what it needs.
    """
    require_one_of("grader", name, GRADERS)
    makers: dict[str, Callable[[], Grader]] = {
        "gsm8k": GSM8K,
        "math": lambda: Math(math_grader),
        "options": lambda: Options(options),
        "exact": Exact,
    }
    return makers[name]()
