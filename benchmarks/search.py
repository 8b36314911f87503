"""Each method's best learning rate, inside its grid and over several seeds.

    python -m benchmarks.search --config benchmarks/science/cifar100.yaml --methods lora,pissa,srlora \
        --rates 0.005,0.01,0.02 --seeds 3 --output runs/search

A method's rate is the one with the lowest mean loss of validation at the last step. Where that is the lowest or the
highest of the grid, the grid grows by a factor of 2 until it is neither. A rate whose loss with the first seed is 10 %
above the lowest is out, and not tried with the others. All other options are for every run, as with ``srlora compare``;
every run is one of the command line in a folder of its own, and is not repeated.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.report import report
from srlora_pl.comparison.cells import Cell, Plan, comparing_in, run
from srlora_pl.comparison.results import Outcome
from srlora_pl.run import config

Point = tuple[tuple[str, str], ...]
RATE = "model.lr"
_MOST = 6  # steps by which a grid grows
_HOPELESS = 1.1  # times the lowest loss


def plan_of(given: argparse.Namespace, options: Sequence[str]) -> Plan:
    """The runs that a search may begin; ``given`` are the options of `parser`."""
    configs = tuple(map(config.find, given.config))
    seeds = tuple(range(given.first_seed, given.first_seed + given.seeds))
    return Plan(configs, config.overlays(given.methods.split(",")), {}, seeds, tuple(options), given.output)


def parser(description: str) -> argparse.ArgumentParser:
    """The options of `plan_of`, and the rates to begin with."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--config", action="append", required=True, help="of the task; several are laid over each other")
    made.add_argument("--methods", default="lora", help="with commas between")
    made.add_argument("--rates", required=True, help="to begin with: two or more, a factor of 2 apart")
    made.add_argument("--seeds", type=int, default=3, help="how many")
    made.add_argument("--first-seed", type=int, default=0)
    made.add_argument("--output", type=Path, required=True, help="the folder of the runs")
    return made


@dataclass
class Search:
    """The search for one method's rate.

    Attributes:
        point: its other settings.
        losses: by rate and seed, of validation; infinite where a run failed.
    """

    plan: Plan
    method: str
    point: Point
    held: BinaryIO
    losses: dict[float, dict[int, float]] = field(default_factory=dict)

    def cell(self, rate: float, seed: int) -> Cell:
        return Cell(self.method, (*self.point, (RATE, f"{rate:g}")), seed)

    def outcome(self, rate: float, seed: int) -> Outcome:
        """That of a run that has finished."""
        cell = self.cell(rate, seed)
        summary = self.plan.summary(cell)
        assert summary is not None
        return Outcome.read(cell, summary)

    def best(self, rates: Sequence[float]) -> float:
        """The best rate, inside its grid unless that has grown `_MOST` times."""
        for rate in rates:
            self._try(rate)
        for _ in range(_MOST):
            best, tried = min(self.losses, key=self._mean), sorted(self.losses)
            beyond = {tried[0]: tried[0] / 2, tried[-1]: tried[-1] * 2}.get(best)
            if beyond is None:
                break
            self._try(beyond)
        return min(self.losses, key=self._mean)

    def _mean(self, rate: float) -> float:
        return statistics.fmean(self.losses[rate].values())

    def _try(self, rate: float) -> None:
        first, *others = self.plan.seeds
        found = {first: self._loss(rate, first)}
        lowest = min((losses[first] for losses in self.losses.values()), default=math.inf)
        if found[first] < _HOPELESS * lowest:
            found |= {seed: self._loss(rate, seed) for seed in others}
        self.losses[rate] = found

    def _loss(self, rate: float, seed: int) -> float:
        if why := run(self.plan, self.cell(rate, seed), self.held):
            print(f"failed: {self.cell(rate, seed).name}: {why}", flush=True)
            return math.inf
        return self.outcome(rate, seed).curve("val/loss")[1][-1]

    def test_losses(self, rate: float) -> list[float]:
        """By seed, at the end of training."""
        return [self.outcome(rate, seed).scores["test/loss"] for seed in self.plan.seeds]


def rates_of(text: str) -> list[float]:
    return [float(rate) for rate in text.split(",")]


def main() -> None:
    given, options = parser(__doc__).parse_known_args()
    plan = plan_of(given, options)
    rows, result = [], {}
    with comparing_in(plan.folder) as held:
        for method in plan.methods:
            search = Search(plan, method, (), held)
            best = search.best(rates_of(given.rates))
            tests = search.test_losses(best)
            spread = statistics.stdev(tests) if len(tests) > 1 else math.nan
            means = {rate: statistics.fmean(each.values()) for rate, each in sorted(search.losses.items())}
            rows.append(
                [method, best, statistics.fmean(tests), spread, " ".join(f"{r:g}:{m:.4f}" for r, m in means.items())]
            )
            result[method] = {"rate": best, "test_losses": tests, "validation": means}
            print(rows[-1], flush=True)
    header = ("method", "best rate", "test loss", "deviation", "validation loss by rate")
    report(f"best rates over seeds {plan.seeds}", header, rows, result)


if __name__ == "__main__":
    main()
