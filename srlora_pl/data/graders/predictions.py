"""``predictions.jsonl``, the answers that a model generated, graded again without the model."""

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from srlora_pl.data.graders import Grade, Grader, grader
from srlora_pl.util.errors import UserError
from srlora_pl.util.tables import markdown

_KINDS = {"split": str, "index": int, "text": str, "reference": str, "finished": bool}
_LIKELY = {"split": str, "index": int, "correct": bool, "answer": str}  # of lines with scores, chosen by likelihood
Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """The lines of ``path``, one for each sample: of several, the last.

    Raises:
        UserError: it is no file of predictions.
    """
    lines: dict[tuple[str, int], Line] = {}
    try:
        texts = path.read_text(encoding="utf-8").split("\n")  # other ends of lines may stand in an answer
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: give a predictions.jsonl of a run") from error
    for number, text in enumerate(texts, start=1):
        if not text:
            continue
        line = _line(text)
        kinds = _LIKELY if line.get("scores") else _KINDS
        wrong = [key for key, kind in kinds.items() if not isinstance(line.get(key), kind)]
        if wrong:
            raise UserError(f"{path} line {number} has no {wrong[0]}: give a predictions.jsonl of a run")
        lines[line["split"], line["index"]] = line
    if not lines:
        raise UserError(f"{path} holds no predictions: give a predictions.jsonl of a run")
    return list(lines.values())


def graded(lines: list[Line], name: str | None, math_grader: str) -> dict[str, list[tuple[Line, Grade]]]:
    """Each line with its new grade, by split.

    Args:
        name: of the grader; by default each line's own. Lines with ``scores``, whose answer was the most likely
            option, keep the grade that they have.

    Raises:
        UserError: a line names no grader, or its grader cannot grade it.
    """

    @cache
    def of(name: str, options: tuple[str, ...]) -> Grader:
        return grader(name, options=options, math_grader=math_grader)

    def grade(line: Line) -> Grade:
        if line.get("scores"):
            return Grade(line["correct"], line["answer"])
        if not (chosen := name or line.get("grader")):
            place = f"sample {line['index']} of {line['split']}"
            raise UserError(f"{place} was predicted without a grader: name one with --grader, such as exact")
        return of(chosen, tuple(map(str, line.get("options") or ()))).grade(line["text"], line["reference"])

    splits = defaultdict(list)
    for line in lines:
        splits[line["split"]].append((line, grade(line)))
    return splits


def report(path: Path, name: str | None = None, math_grader: str = "hendrycks") -> str:
    """A table of each split's accuracy in percent, and of how many answers have no end or could not be read."""
    rows, accuracies = [], []
    for split, pairs in graded(read(path), name, math_grader).items():
        counts = [
            len(pairs),
            sum(grade.correct for _, grade in pairs),
            sum(not line.get("finished", True) for line, _ in pairs),
            sum(grade.answer is None for _, grade in pairs),
        ]
        accuracies.append(100 * counts[1] / counts[0])
        rows.append([split, f"{accuracies[-1]:.2f}", *map(str, counts)])
    if len(rows) > 1:
        rows.append(["mean", f"{sum(accuracies) / len(accuracies):.2f}", *[""] * 4])
    return markdown(["split", "accuracy", "samples", "correct", "unfinished", "unreadable"], rows)


def _line(text: str) -> Line:
    try:
        line = json.loads(text)
    except ValueError:
        return {}
    return line if isinstance(line, dict) else {}
