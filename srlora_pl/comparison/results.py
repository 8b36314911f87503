"""The results of a comparison's runs: rows, tables, and tests of whether methods differ."""

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from scipy.stats import ttest_rel

from srlora_pl.comparison.cells import Cell
from srlora_pl.run import config
from srlora_pl.util.tables import markdown

_ROUNDING = 1e-6  # of scores in single precision; a sample more in 40,000 changes one by 2.5e-5
_MANY = 4  # methods, beyond which not each two of them are tested
QUARTERS = (0.25, 0.5, 0.75, 1.0)
Grids = Mapping[str, Mapping[str, Sequence[str]]]  # see `Plan`
# What a run costs, by the title of a column: from its summary, and how it is written.
_COSTS: dict[str, tuple[Callable[[Mapping[str, Any]], float], str]] = {
    "trained": (lambda summary: summary["parameters"]["trained"], ",.0f"),
    "steps": (lambda summary: summary["steps"], ",.0f"),
    "seconds": (lambda summary: summary["seconds"], ",.0f"),
    "GiB": (lambda summary: summary["peak_memory"] / 2**30, ".2f"),
}


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        cell: which one.
        summary: its ``summary.json``.
        metrics: the rows of its ``metrics.csv``, without empty values.
    """

    cell: Cell
    summary: Mapping[str, Any]
    metrics: Sequence[Mapping[str, float]]

    @classmethod
    def read(cls, cell: Cell, summary: Mapping[str, Any]) -> "Outcome":
        file = Path(summary["folder"], "metrics.csv")  # absent where the run was shorter than one interval of logging
        lines = csv.DictReader(file.read_text().splitlines() if file.is_file() else ())
        rows = [{key: float(value) for key, value in row.items() if value} for row in lines]
        return cls(cell, summary, rows)

    @property
    def scores(self) -> Mapping[str, float]:
        """The final scores, with ``test/score`` or ``val/score``, the task's main one."""
        return self.summary["scores"]

    @property
    def score(self) -> float:
        first = next(name for name in self.scores if name.endswith("/score"))  # of several splits, their mean's
        return self.scores[next((name for name in ("test/score", "val/score") if name in self.scores), first)]

    @property
    def remedy(self) -> str | None:
        """How to score on other data than those of validation; None where they differ."""
        if not any(name.startswith("test") for name in self.scores):
            return "give the data a labelled test split"
        data = config.read(str(Path(self.summary["folder"], "config.yaml")))["data"]
        is_dev = data["class_path"].endswith("GLUEData") and data["init_args"]["val_fraction"] == 0
        return "set data.val_fraction above 0" if is_dev else None

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """The optimizer steps at which ``name`` was logged, and its values."""
        points = [(row["step"] + 1, row[name]) for row in self.metrics if name in row]
        return [step for step, _ in points], [value for _, value in points]

    def at_quarters(self, name: str) -> list[float | None]:
        """The last value of ``name`` after 25, 50, 75 and 100 % of the steps; None before the first."""
        steps, values = self.curve(name)
        until = (sum(step <= quarter * self.summary["steps"] for step in steps) for quarter in QUARTERS)
        return [values[count - 1] if count else None for count in until]

    def row(self) -> dict[str, Any]:
        """For results.csv."""
        quarters = {
            f"{name} at {quarter:.0%}": value
            for name in ("val/score", "val/loss")
            for quarter, value in zip(QUARTERS, self.at_quarters(name), strict=True)
        }
        return {
            "cell": self.cell.name,
            "method": self.cell.method,
            **dict(self.cell.point),
            "seed": self.cell.seed,
            **{f"best {self.summary['best'].get('monitor', '')}": self.summary["best"].get("value")},
            **quarters,
            **self.scores,
            **{key: self.summary[key] for key in ("steps", "switches", "restarts") if key in self.summary},
            **{key: self.summary[key] for key in ("seconds", "peak_memory")},
            **{f"{kind} parameters": count for kind, count in self.summary["parameters"].items()},
            "commit": self.summary.get("commit"),
        }


def best_point(outcomes: Iterable[Outcome]) -> Cell:
    """The cell whose best checkpoint has the best monitored value; of equals, and of runs without validation, the
    first."""

    def distance(outcome: Outcome) -> float:
        best = outcome.summary["best"]
        value = best.get("value", math.nan)
        return math.inf if math.isnan(value) else value if best["mode"] == "min" else -value

    return min(outcomes, key=distance).cell


@dataclass(frozen=True)
class Difference:
    """The difference between the scores of two methods, over the seeds that both have.

    Attributes:
        mean: of the differences, seed by seed.
        low, high: the ends of its 95 % confidence interval.
        p: of the paired, two-sided t-test.
        n: seeds.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int

    @classmethod
    def between(cls, first: Mapping[int, float], second: Mapping[int, float]) -> "Difference | None":
        """The difference of scores by seed.

        None with fewer than two common seeds, if all differences are equal, or if a score is not finite.
        """
        seeds = sorted(first.keys() & second.keys())
        pairs = [(first[seed], second[seed]) for seed in seeds]
        differences = [one - other for one, other in pairs]
        # Rounding spreads equal differences a little, which the test would call significant.
        least = _ROUNDING * max((abs(score) for pair in pairs for score in pair), default=0.0)
        finite = all(map(math.isfinite, differences))
        if len(seeds) < 2 or not finite or max(differences) - min(differences) <= least:
            return None
        test = ttest_rel(*zip(*pairs, strict=True))
        interval = test.confidence_interval(0.95)
        mean = statistics.fmean(differences)
        return cls(mean, float(interval.low), float(interval.high), float(test.pvalue), len(seeds))


def table(outcomes: Mapping[str, Sequence[Outcome]], paper: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown tables: mean, standard deviation and n of each method beside the paper's numbers; the course of
    validation; and the differences between methods.

    Args:
        outcomes: of each method's chosen point, one per seed.
        paper: by method, its numbers in percent, by the names that `Outcome.scores` has without the split.
    """
    every = outcomes.values()
    points = [[f"{key.rpartition('.')[2]} {value}" for key, value in runs[0].cell.point] for runs in every]
    columns = [("method", [*outcomes]), ("chosen", [", ".join(point) or "-" for point in points])]
    columns.append(("n", [str(len(runs)) for runs in every]))
    for name in dict.fromkeys(name for runs in every for run in runs for name in run.scores):
        kind = name.partition("/")[2]
        if kind == "score":  # the main one's second name
            continue
        columns.append((_title(name), [_spread([run.scores.get(name) for run in runs], name) for runs in every]))
        numbers = [paper.get(method, {}).get(kind) for method in outcomes]
        if any(numbers):
            columns.append(("paper", [f"{number:g}" if number else "-" for number in numbers]))
    for title, (cost, form) in _COSTS.items():
        columns.append((title, [format(statistics.fmean(cost(run.summary) for run in runs), form) for runs in every]))
    course = [("method", [*outcomes])]
    for name in ("val/score", "val/loss"):
        for i, quarter in enumerate(QUARTERS):
            cells = [_spread([run.at_quarters(name)[i] for run in runs], name) for runs in every]
            course.append((f"{_title(name, ',')} at {quarter:.0%}", cells))
    tables = [
        markdown([title for title, _ in each], zip(*(cells for _, cells in each), strict=True))
        for each in (columns, course)
    ]
    return "\n".join([tables[0], "", tables[1], "", *_differences(outcomes), ""])


def _title(name: str, behind: str = "") -> str:
    return name.replace("/", " ") + ("" if name.endswith("/loss") else f", %{behind}")


def _spread(values: Sequence[float | None], name: str) -> str:
    """Mean and standard deviation of those that there are, in percent if they are no losses."""
    scale, digits = (1, 3) if name.endswith("/loss") else (100, 2)
    known = [scale * value for value in values if value is not None]
    if not known:
        return "-"
    if not all(map(math.isfinite, known)):
        return "not finite"
    deviation = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.{digits}f}{deviation}"


def _differences(outcomes: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """A line for each two methods; of many methods for the first one and each other."""
    lines, pairs = [], list(combinations(outcomes, 2))
    scores = {method: {run.cell.seed: run.score for run in runs} for method, runs in outcomes.items()}
    for first, second in pairs[: len(outcomes) - 1] if len(outcomes) > _MANY else pairs:
        if found := Difference.between(scores[first], scores[second]):
            lines.append(
                f"* {first} - {second}: {100 * found.mean:+.2f} points (95 % interval {100 * found.low:+.2f} to "
                f"{100 * found.high:+.2f}; paired t-test over {found.n} seeds, p = {found.p:.3f}): "
                f"{'significant' if found.p < 0.05 else 'not significant'} at 5 %."
            )
        else:
            why = "fewer than two seeds in common, the same difference with all of them, or a score that is not finite"
            lines.append(f"* {first} against {second}: nothing can be tested ({why}).")
    return lines


def at_the_edge(grids: Grids, best: Mapping[str, Cell]) -> tuple[list[str], dict[str, dict[str, list[str]]]]:
    """A line for each method and setting where the best point has the lowest or the highest number of its grid, and the
    grids with the numbers beyond."""
    lines, wider = [], {method: {key: [*values] for key, values in grid.items()} for method, grid in grids.items()}
    for method, cell in best.items():
        for key, text in cell.point:
            try:
                values = sorted(map(float, grids[method][key]))
            except ValueError:  # no numbers
                continue
            if len(values) > 1 and float(text) in (values[0], values[-1]):
                end = "lowest" if float(text) == values[0] else "highest"
                lines.append(f"* {method} chose {key} {text}, the {end} of the grid: the best may lie beyond it.")
                wider[method][key] += _beyond(values, end)
    return lines, wider


def _beyond(values: Sequence[float], end: str) -> list[str]:
    """The next number beyond an ``end`` of ``values``, ascending: at the same ratio, or difference if one is not above
    0; none beyond a 0."""
    edge, inner = (values[0], values[1]) if end == "lowest" else (values[-1], values[-2])
    if edge == 0:
        return []
    beyond = edge * edge / inner if values[0] > 0 else 2 * edge - inner
    return [f"{int(beyond)}" if all(value == int(value) for value in (*values, beyond)) else f"{beyond:.2g}"]


def unequal_terms(outcomes: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """A line where methods differ in the number of trained parameters or of steps."""
    rows = {method: [run.row() for run in runs] for method, runs in outcomes.items()}
    names = [
        name
        for name in ("trained parameters", "steps")
        if len({tuple(sorted({row[name] for row in each})) for each in rows.values()}) > 1
    ]
    return [f"* The methods are not on equal terms: they differ in {' and '.join(names)}."] if names else []


def made_with(outcomes: Iterable[Outcome]) -> dict[str, list[str | None]]:
    """The ``commit`` and the versions of libraries of the runs, each value once; None where it is not known."""
    each = [{"commit": outcome.summary.get("commit"), **outcome.summary["versions"]} for outcome in outcomes]
    names = dict.fromkeys(name for versions in each for name in versions)
    return {name: list(dict.fromkeys(versions.get(name) for versions in each)) for name in names}
