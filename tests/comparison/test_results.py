"""What is said of finished runs, from made-up runs whose means, deviations and tests are known."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from srlora_pl.comparison.cells import Cell, Plan
from srlora_pl.comparison.results import Difference, Outcome, at_the_edge, best_point, made_with, table, unequal_terms
from srlora_pl.run.config import find

POINT = (("model.lr", "0.1"),)


def outcome(method="lora", seed=0, score=0.5, losses=(4.0, 3.0, 2.0, 1.0), point=POINT, best=1.0, mode="min"):
    """A run of 40 steps that was validated after every tenth."""
    metrics = [{"step": 10.0 * i + 9, "val/loss": loss, "val/score": 1 - loss / 10} for i, loss in enumerate(losses)]
    metrics += [{"step": 4.0, "train/loss": 9.0}]
    summary = {
        "scores": {"test/accuracy": score, "test/score": score, "test/loss": 2 * score},
        "best": {"monitor": "val/loss", "mode": mode, "value": best},
        "steps": 40,
        "switches": 3,
        "seconds": 7.0,
        "peak_memory": 3 * 2**29,
        "parameters": {"adapters": 5, "trained": 1234, "all": 5678},
    }
    return Outcome(Cell(method, point, seed), summary, metrics)


def test_losses_are_those_of_the_last_validation_until_then():
    assert outcome().at_quarters("val/loss") == [4.0, 3.0, 2.0, 1.0]
    early = outcome(losses=(4.0, 3.0))
    assert early.at_quarters("val/loss") == [4.0, 3.0, 3.0, 3.0]
    assert outcome(losses=()).at_quarters("val/loss") == [None] * 4
    assert outcome().curve("train/loss") == ([5.0], [9.0])


def test_a_run_is_read_from_its_folder(tmp_path: Path):
    (tmp_path / "metrics.csv").write_text("epoch,step,val/loss\n0,3,\n0,9,0.25\n")
    made = Outcome.read(Cell("lora", (), 0), {"folder": str(tmp_path), "steps": 10})
    assert made.at_quarters("val/loss") == [None, None, None, 0.25]


def test_a_run_that_logged_nothing_has_no_curve(tmp_path: Path):
    assert Outcome.read(Cell("lora", (), 0), {"folder": str(tmp_path), "steps": 1}).metrics == []


@pytest.mark.parametrize(("mode", "chosen"), [("min", "0.1"), ("max", "0.3")])
def test_the_best_point_is_that_of_the_best_checkpoint(mode, chosen):
    values = {"0.1": 1.0, "0.2": math.nan, "0.3": 2.0}
    runs = [outcome(point=(("model.lr", lr),), best=value, mode=mode) for lr, value in values.items()]
    assert best_point(runs).point == (("model.lr", chosen),)


def test_the_difference_of_two_methods_is_paired_by_seed():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 2 sqrt(3) with 2 degrees of freedom."""
    found = Difference.between({0: 11.0, 1: 22.0, 2: 33.0, 7: 99.0}, {2: 30.0, 1: 20.0, 0: 10.0})
    assert found is not None
    t = 2 * math.sqrt(3)
    assert (found.mean, found.n) == (2.0, 3)
    # With two degrees of freedom the distribution of t is 1/2 + t / (2 sqrt(2 + t^2)), its 97.5 % quantile 4.30265.
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t**2), rel=1e-9)
    assert (found.low, found.high) == pytest.approx((2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), rel=1e-5)


def test_nothing_is_said_of_a_difference_that_cannot_be_told():
    assert Difference.between({0: 1.0}, {0: 2.0}) is None
    assert Difference.between({0: 1.0, 1: 2.0}, {2: 1.0, 3: 2.0}) is None
    assert Difference.between({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0}) is None


@pytest.mark.parametrize("precision", [float, lambda value: torch.tensor(value).item()], ids=["double", "single"])
def test_rounding_is_no_spread(precision):
    scores = [
        {seed: precision(value) for seed, value in enumerate(each)} for each in ((0.9, 0.8, 0.7), (0.8, 0.7, 0.6))
    ]
    assert len({one - other for one, other in zip(scores[0].values(), scores[1].values(), strict=True)}) > 1
    assert Difference.between(*scores) is None
    runs = {m: [outcome(m, seed, score) for seed, score in each.items()] for m, each in zip("ab", scores, strict=True)}
    assert "* a against b: nothing can be tested (" in table(runs, {})
    assert (
        Difference.between({0: 0.9, 1: 0.8}, {0: 0.9, 1: 0.8 + 1 / 40_000}) is not None
    )  # one sample of QQP's dev set


def test_the_table():
    runs = {
        "lora": [outcome(seed=seed, score=score) for seed, score in enumerate([0.5, 0.6, 0.7])],
        "srlora": [outcome("srlora", seed=seed, score=score, point=()) for seed, score in enumerate([0.6, 0.8, 1.0])],
    }
    lines = table(runs, {"srlora": {"accuracy": 92.5}}).splitlines()
    assert lines[:4] == [
        "| method | chosen | n | test accuracy, % | paper | test loss | trained | steps | seconds | GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| lora | lr 0.1 | 3 | 60.00 ± 10.00 | - | 1.200 ± 0.200 | 1,234 | 40 | 7 | 1.50 |",
        "| srlora | - | 3 | 80.00 ± 20.00 | 92.5 | 1.600 ± 0.400 | 1,234 | 40 | 7 | 1.50 |",
    ]
    parts = ("25%", "50%", "75%", "100%")
    names = " | ".join(f"{name} at {part}" for name in ("val score, %,", "val loss") for part in parts)
    scores, losses = "60.00 ± 0.00 | 70.00 ± 0.00 | 80.00 ± 0.00 | 90.00 ± 0.00", "4.000 ± 0.000 | 3.000 ± 0.000"
    assert lines[5] == f"| method | {names} |"
    assert lines[7] == f"| lora | {scores} | {losses} | 2.000 ± 0.000 | 1.000 ± 0.000 |"
    # Differences -10, -20, -30 points: t = 2 sqrt(3), as above.
    p = 1 - 2 * math.sqrt(3) / math.sqrt(2 + 12)
    assert lines[10] == (
        f"* lora - srlora: -20.00 points (95 % interval -44.84 to +4.84; paired t-test over 3 seeds, p = {p:.3f}): "
        "not significant at 5 %."
    )


def test_of_many_methods_each_is_tested_against_the_first():
    runs = {name: [outcome(name, seed, score=0.1 * seed) for seed in range(3)] for name in "abcde"}
    lines = [line for line in table(runs, {}).splitlines() if line.startswith("*")]
    assert [line.split(":")[0] for line in lines] == [f"* a against {name}" for name in "bcde"]


def test_a_best_point_at_the_edge_of_its_grid_is_told_with_what_lies_beyond():
    shared = {"model.schedule": ["linear", "cosine"], "data.batch_size": ["8", "16", "32"]}
    rates = {"lora": ["0.1", "1e-2", "1"], "pissa": ["0.1", "1e-2", "1"], "srlora": ["1e-2", "3e-2"]}
    grids = {method: {"model.lr": values, **shared} for method, values in rates.items()}
    points = {"lora": ("1", "16"), "pissa": ("0.1", "8"), "srlora": ("1e-2", "32")}
    best = {
        method: Cell(method, (("model.lr", lr), ("model.schedule", "linear"), ("data.batch_size", size)), 0)
        for method, (lr, size) in points.items()
    }
    lines, wider = at_the_edge(grids, best)
    assert lines == [
        "* lora chose model.lr 1, the highest of the grid: the best may lie beyond it.",
        "* pissa chose data.batch_size 8, the lowest of the grid: the best may lie beyond it.",
        "* srlora chose model.lr 1e-2, the lowest of the grid: the best may lie beyond it.",
        "* srlora chose data.batch_size 32, the highest of the grid: the best may lie beyond it.",
    ]
    assert wider == {
        "lora": {"model.lr": ["0.1", "1e-2", "1", "10"], **shared},
        "pissa": {**grids["pissa"], "data.batch_size": ["8", "16", "32", "4"]},
        "srlora": {**shared, "model.lr": ["1e-2", "3e-2", "0.0033"], "data.batch_size": ["8", "16", "32", "64"]},
    }


def test_the_command_that_looks_beyond_names_the_configs_of_this_package(tmp_path):
    own = tmp_path / "mine.yaml"
    methods = {"lora": Path(find("methods/lora")), "mine": own}
    plan = Plan((find("quickstart"), str(own)), methods, {}, (0,), (), Path("out"))
    words = f"compare --config quickstart --config {own} --methods lora,{own} --seeds 1 --output out --grid lora.x=1,2"
    assert plan.command({"lora": {"x": ["1", "2"]}}).endswith(words)


@pytest.mark.parametrize(
    ("values", "chosen", "beyond"),
    [(["0", "0.1"], "0", []), (["0", "0.1"], "0.1", ["0.2"]), (["-2", "2"], "-2", ["-6"]), (["5"], "5", [])],
)
def test_beyond_an_edge_that_is_not_above_0_the_difference_goes_on(values, chosen, beyond):
    _, wider = at_the_edge({"lora": {"x": values}}, {"lora": Cell("lora", (("x", chosen),), 0)})
    assert wider["lora"]["x"] == [*values, *beyond]


def altered(run: Outcome, **summary) -> Outcome:
    return replace(run, summary={**run.summary, **summary})


def test_methods_that_trained_more_are_named():
    lora, srlora = outcome(), outcome("srlora")
    assert unequal_terms({"lora": [lora, lora], "srlora": [srlora]}) == []
    assert unequal_terms({"lora": [lora], "srlora": [altered(srlora, parameters={"trained": 6})]}) == [
        "* The methods are not on equal terms: they differ in trained parameters."
    ]
    runs = {"lora": [lora, altered(lora, steps=50)], "srlora": [srlora]}
    assert unequal_terms(runs) == ["* The methods are not on equal terms: they differ in steps."]


def test_runs_of_other_code_or_libraries_are_told_apart():
    first = altered(outcome(), commit="abc", versions={"torch": "2.0", "peft": "0.1"})
    assert made_with([first, first]) == {"commit": ["abc"], "torch": ["2.0"], "peft": ["0.1"]}
    earlier = altered(outcome(), versions={"torch": "2.0"})  # of before commits were kept
    assert made_with([first, earlier]) == {"commit": ["abc", None], "torch": ["2.0"], "peft": ["0.1", None]}


def test_a_row_is_plain_data():
    row = json.loads(json.dumps(outcome().row()))
    assert (row["model.lr"], row["seed"], row["best val/loss"], row["val/loss at 50%"]) == ("0.1", 0, 1.0, 3.0)
    assert row["val/score at 100%"] == 0.9
    assert row["commit"] is None
    assert (row["seconds"], row["trained parameters"], row["test/score"]) == (7.0, 1234, 0.5)
