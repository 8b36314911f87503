"""Whether a method beats others on several tasks: tests paired by seed, corrected for their number after Holm.

    python -m benchmarks.science.verdict --method srlora --against lora,pissa runs/confirmation/mnist \
        runs/confirmation/text

The folders are those of ``srlora compare``, one for each task; ``test/score`` is compared. A method beats another on a
task where its score is higher with a corrected p below 0.01.
"""

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.report import report
from srlora_pl.comparison.results import Difference

LEVEL = 0.01


def scores_in(folder: Path) -> dict[str, dict[int, float]]:
    """The score of each run, by method and seed."""
    with (folder / "results.csv").open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    methods = dict.fromkeys(row["method"] for row in rows)
    return {m: {int(row["seed"]): float(row["test/score"]) for row in rows if row["method"] == m} for m in methods}


def holm(values: Sequence[float]) -> list[float]:
    """The p-values ``values`` corrected for their number (Holm 1979), in the same order."""
    corrected, least = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        least = max(least, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = least
    return corrected


def compared(folder: Path, method: str, other: str) -> dict[str, Any]:
    """Both methods' means, and the difference of their scores over common seeds with its deviation."""
    scores = scores_in(folder)
    first, second = scores[method], scores[other]
    found = Difference.between(first, second)
    if found is None:
        raise SystemExit(f"error: {folder} has too few common seeds of {method} and {other} for a test")
    differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    means = {name: statistics.fmean(scores[name].values()) for name in (method, other)}
    return {"task": folder.name, "other": other, "means": means, **vars(found), "sd": statistics.stdev(differences)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", required=True)
    parser.add_argument("--against", required=True, help="with commas between")
    parser.add_argument("folders", nargs="+", type=Path)
    given = parser.parse_args()
    found = [compared(folder, given.method, other) for folder in given.folders for other in given.against.split(",")]
    rows = []
    for each, p in zip(found, holm([each["p"] for each in found]), strict=True):
        each["corrected"] = p
        verdict = "not told apart" if p >= LEVEL else "better" if each["mean"] > 0 else "worse"
        means = [f"{mean:.4f}" for mean in each["means"].values()]
        interval = f"{each['mean']:+.4f} ({each['low']:+.4f}, {each['high']:+.4f})"
        effect = each["mean"] / each["sd"] if each["sd"] else math.inf
        rows.append([each["task"], each["other"], each["n"], *means, interval, effect, each["p"], p, verdict])
    header = ("task", "against", "n", "score", "its score", "difference (95 %)", "in SD", "p", "p (Holm)", "verdict")
    report(f"{given.method}, test/score", header, rows, {"comparisons": found})


if __name__ == "__main__":
    main()
