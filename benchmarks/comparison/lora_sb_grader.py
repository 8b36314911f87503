"""LoRA-SB's own grading (arXiv:2411.19557), to hold numbers against that paper's; not for results of one's own.

    python -m benchmarks.comparison.lora_sb_grader runs/mistral_7b_math_lora_sb-lorasb/version_0/predictions.jsonl

It prints each split's accuracy as ``srlora grade`` counts it, and as the authors' code does. That code counts as right,
besides normalised strings that are equal:

- every answer to a problem of MATH that cannot be normalised, such as ``x/2``: it is then compared with itself;
- numbers within 1e-4 of the gold answer, of a hundredth of it, and of its hundredfold, GSM8K's too;
- what is equal without its brackets and braces, and tuples whose elements are;
- what sympy simplifies to the same, as far as it is Python: a reader of LaTeX is not among the packages it asks for.

Like theirs, it lets sympy evaluate what the model wrote: use it on the answers of models that you trust.
"""

import argparse
import math
import multiprocessing
from contextlib import suppress
from pathlib import Path
from typing import Any

from sympy import N, simplify
from sympy.parsing.sympy_parser import parse_expr

from benchmarks.report import report
from srlora_pl.data.graders import Grade, hendrycks
from srlora_pl.data.graders.predictions import Line, graded, read

SECONDS = 5  # for sympy, which may need for ever; theirs waits


def equal(answer: str, gold: str) -> bool:
    """Whether an answer to a problem of MATH is right."""
    try:
        pair = hendrycks.normalised(answer), hendrycks.normalised(gold)
    except (ValueError, IndexError):
        return close(answer, answer) or answer == gold
    return pair[0] == pair[1] or close(*pair)


def close(answer: str, gold: str) -> bool:
    """Whether two normalised strings are equal in one of the other ways."""
    number, golden = _number(answer), _number(gold)
    if number is not None and golden is not None:
        return any(math.isclose(number, golden * factor, rel_tol=1e-4) for factor in (0.01, 1, 100))
    answer, gold = answer.strip(), gold.strip()
    if _without_brackets(answer, answer, gold) == _without_brackets(gold, answer, gold):
        return True
    if any(_within(text, answer) and _within(text, gold) for text in ("[]", "()")):
        parts = answer[1:-1].split(","), gold[1:-1].split(",")
        if len(parts[0]) == len(parts[1]) and all(map(close, *parts)):
            return True
    return _simplify_to_the_same(answer, gold)


def _number(text: str) -> float | None:
    with suppress(ValueError):
        return float(text.replace(",", ""))
    return None


def _within(brackets: str, text: str) -> bool:
    return text.startswith(brackets[0]) and text.endswith(brackets[1])


def _without_brackets(text: str, answer: str, gold: str) -> str:
    square = _within("[]", answer) and not gold.startswith("(")
    if square or (_within("()", answer) and not gold.startswith("[")):
        text = text.strip("[]()")
    return text.translate(dict.fromkeys(map(ord, "{}()")))


def _simplify_to_the_same(answer: str, gold: str) -> bool:
    """In a process of its own, as a power of powers ends no sooner for being asked to."""
    with multiprocessing.get_context("fork").Pool(1) as pool, suppress(multiprocessing.TimeoutError):
        return pool.apply_async(_simplified, (answer, gold)).get(SECONDS)
    return False


def _simplified(*pair: Any) -> bool:
    read: list[Any] = list(pair)
    for i in range(2):
        with suppress(Exception):
            read[i] = parse_expr(pair[i])
    with suppress(Exception):
        if simplify(read[0] - read[1]) == 0:
            return True
    with suppress(Exception):
        return math.isclose(N(read[0]), N(read[1]), rel_tol=1e-3)
    return False


def is_correct(line: Line, grade: Grade) -> bool:
    """Whether the authors' code counts the answer of ``line``, read as ours reads it, as right."""
    if grade.correct or grade.answer is None:
        return grade.correct
    if line["grader"] == "math":
        return equal(grade.answer, hendrycks.boxed(line["reference"]) or line["reference"])
    return line["grader"] == "gsm8k" and close(grade.answer, line["reference"].rpartition("#### ")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", type=Path, help="a run's predictions.jsonl, of GSM8K, MATH or the eight sets")
    path = parser.parse_args().predictions
    accuracies = {}
    for split, pairs in graded(read(path), None, "hendrycks").items():
        ours, theirs = sum(grade.correct for _, grade in pairs), sum(is_correct(*pair) for pair in pairs)
        accuracies[split] = {"ours": 100 * ours / len(pairs), "theirs": 100 * theirs / len(pairs)}
    rows = [[split, f"{each['ours']:.2f}", f"{each['theirs']:.2f}"] for split, each in accuracies.items()]
    report(
        str(path), ["split", "srlora grade", "LoRA-SB's code"], rows, {"benchmark": "grader", "accuracy": accuracies}
    )


if __name__ == "__main__":
    main()
