"""The compare command, on short real runs."""

import csv
import io
import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import rich.progress
import yaml
from rich.console import Console

from srlora_pl import cli
from srlora_pl.comparison import command
from srlora_pl.comparison.cells import Cell, comparing_in
from srlora_pl.comparison.command import plans_of
from srlora_pl.comparison.paper import NUMBERS
from srlora_pl.util import json_text
from srlora_pl.util.errors import UserError
from tests.helpers.errors import mentions
from tests.helpers.paths import ROOT
from tests.helpers.waiting import wait_until, words_of


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """The quickstart, cut down to 12 steps with two switches."""
    settings = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    settings["model"]["init_args"]["method"]["init_args"] |= {"rank": 2, "target_rank": 5, "layers": "0-1"}
    settings["model"]["init_args"]["warmup_steps"] = 2
    settings["trainer"] |= {"max_steps": 12, "val_check_interval": 4, "log_every_n_steps": 2, "limit_test_batches": 4}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def given(**values) -> Namespace:
    defaults = {"config": [], "table": None, "methods": None, "seeds": 5, "grid": [], "output": "out"}
    return Namespace(**(defaults | values))


def finish(output: Path, name: str, score: float = 0.5, losses: str = "1,2.5\n", data: Any = None, **more: Any) -> None:
    """What a finished run of the cell ``name`` leaves, as far as a comparison looks at it."""
    folder = output / name / "small-method/version_0"
    folder.mkdir(parents=True)
    summary = {
        "scores": {"test/score": score, "test/accuracy": score},
        "best": {"monitor": "val/loss", "mode": "min", "value": 1 - score},
        "steps": 12,
        "switches": 0,
        "seconds": 1.0,
        "peak_memory": 1,
        "parameters": {"adapters": 1, "trained": 2, "all": 3},
        "device": "some CPU",
        "versions": {"torch": "2.0"},
        "commit": "abc",
    }
    (folder / "summary.json").write_text(json.dumps(summary | more))
    (folder / "metrics.csv").write_text(f"step,train/loss\n{losses}")
    data = data or {"class_path": "srlora_pl.ImageData", "init_args": {"val_fraction": 0.1}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))


def test_a_plan_is_the_grid_with_one_seed_and_the_best_points_with_the_others(task):
    options = given(config=[str(task)], methods="lora,srlora", seeds=3, grid=["model.lr=0.1,1e-2", "data.batch_size=4"])
    (plan,) = plans_of(options, ("--data.num_workers", "0"))
    assert [cell.name for cell in plan.trials] == [
        "lora-lr0.1-batch_size4-seed0",
        "lora-lr1e-2-batch_size4-seed0",
        "srlora-lr0.1-batch_size4-seed0",
        "srlora-lr1e-2-batch_size4-seed0",
    ]
    assert [cell.name for cell in plan.repetitions([plan.trials[1], plan.trials[2]])] == [
        "lora-lr1e-2-batch_size4-seed1",
        "srlora-lr0.1-batch_size4-seed1",
        "lora-lr1e-2-batch_size4-seed2",
        "srlora-lr0.1-batch_size4-seed2",
    ]
    assert plan.size == 8
    arguments = plan.arguments(plan.trials[1])
    assert arguments[:5] == ["fit", "--config", str(task), "--config", str(plan.methods["lora"])]
    assert plan.methods["lora"].resolve() == ROOT / "configs/methods/lora.yaml"
    pairs = dict(zip(arguments[5::2], arguments[6::2], strict=True))
    assert pairs == {
        "--data.num_workers": "0",
        "--seed_everything": "0",
        "--model.lr": "1e-2",
        "--data.batch_size": "4",
        "--trainer.default_root_dir": "out/lora-lr1e-2-batch_size4-seed0",
        "--ckpt_path": "last",
    }


def test_a_method_may_have_values_of_its_own(task):
    grid = ["model.lr=0.1", "lora.model.lr=1,2", "srlora.data.batch_size=4", "srlora.model.method.rank=2,3"]
    (plan,) = plans_of(given(config=[str(task)], methods="lora,pissa,srlora", grid=grid), ())
    assert plan.points("lora") == [(("model.lr", "1"),), (("model.lr", "2"),)]
    assert plan.points("pissa") == [(("model.lr", "0.1"),)]
    rest = (("model.lr", "0.1"), ("data.batch_size", "4"))
    assert plan.points("srlora") == [(*rest, ("model.method.rank", "2")), (*rest, ("model.method.rank", "3"))]
    assert plan.size == 5 + 3 * 4


def test_the_command_that_goes_on_means_the_same_runs(task):
    grid = ["model.lr=0.1,1", "data.crop_scale=[0.5,1]", "pissa.model.lr=3"]
    options = ("--data.num_workers", "0")
    (plan,) = plans_of(given(config=[str(task)], methods="lora,pissa", seeds=2, grid=grid), options)
    words = shlex.split(plan.command(plan.grids))
    assert words[:3] == ["python", "cli.py", "compare"]
    found, rest = cli._parsers()[1]["compare"].parse_known_args(words[3:])
    assert plans_of(found, tuple(rest)) == [plan]


def test_the_papers_tables():
    plans = plans_of(given(table="3", output="out"), ())
    assert [plan.folder.name for plan in plans] == [
        f"deberta_{task}_srlora" for task in ("sst2", "mrpc", "cola", "qnli", "rte", "stsb")
    ]
    assert {tuple(plan.methods) for plan in plans} == {("lora", "pissa", "srlora")}
    plans = plans_of(given(table="4", seeds=2), ())
    assert [(Path(plan.configs[0]).stem, plan.size) for plan in plans] == [
        ("vit_cifar100_srlora", 4),
        ("vit_stl10_srlora", 4),
        ("vit_mnist_srlora", 4),
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"config": ["TASK"], "seeds": 0}, ["--seeds", "0"]),
        ({"config": ["TASK"], "methods": "lora,srlra"}, ["methods/srlra", "'methods/srlora'"]),
        ({"config": ["TASK"], "methods": "lora,lora"}, ["lora", "twice"]),
        ({"config": ["TASK"], "grid": ["model.lr"]}, ["model.lr", "values"]),
        ({"config": ["TASK"], "grid": ["model.lr=1,1"]}, ["model.lr=1,1", "twice"]),
        ({"config": ["TASK"], "grid": ["model.lr=0.001,1e-3"]}, ["model.lr=0.001,1e-3", "twice"]),
        ({"config": ["TASK"], "grid": ["data.crop_scale=[0.5,1],[0.50, 1]"]}, ["data.crop_scale", "twice"]),
        ({"config": ["TASK"], "grid": ["model.lr=1", "model.lr=2"]}, ["--grid", "model.lr", "twice"]),
        ({"config": ["TASK"], "grid": ["lora.model.lr=1", "lora.model.lr=2"]}, ["--grid", "lora.model.lr", "twice"]),
        ({"config": ["TASK"], "grid": ["lra.model.lr=1,2"]}, ["--grid", "lra", "--methods", "'lora'"]),
        ({"config": ["TASK"], "methods": "lora,"}, ["methods/ does not exist"]),
    ],
)
def test_what_cannot_be_compared_is_refused(values, words, task):
    values = {key: [str(task)] if value == ["TASK"] else value for key, value in values.items()}
    with pytest.raises(UserError, match=mentions(*words)):
        plans_of(given(**values), ())


@pytest.mark.parametrize("words", [[], ["--config=small.yaml", "--table=3"], ["--table=5"]])
def test_a_comparison_is_of_one_task_or_of_a_table_of_the_paper(words, capsys):
    assert cli.main(["compare", "--output", "out", *words]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "--table" in sentence
    assert all(word.partition("=")[2] in sentence or "--config" in sentence for word in words)


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("seed_everything", "--seeds"),
        ("ckpt_path", "leave it out"),
        ("trainer.default_root_dir", "--output"),
        ("model.method", "overlay"),
        ("model.method.class_path", "overlay"),
        ("model.init_args.method", "overlay"),
    ],
)
def test_what_compare_itself_sets_is_refused(key, advice, task):
    for words in ((f"--{key}", "1"), (f"--{key}=1",)):
        with pytest.raises(UserError, match=mentions(f"--{key}", advice)):
            plans_of(given(config=[str(task)]), ("--model.lr", "1", *words))
    with pytest.raises(UserError, match=mentions("--grid", key, advice)):
        plans_of(given(config=[str(task)], grid=[f"{key}=1,2"]), ())


def test_one_place_for_a_setting(task):
    for option in (["--model.lr", "1"], ["--model.init_args.lr=1"]):
        with pytest.raises(UserError, match=mentions("--grid", "model.lr")):
            plans_of(given(config=[str(task)], grid=["model.lr=1,2"]), tuple(option))


def test_a_zero_is_a_value_of_its_own_and_whole_numbers_are_not_shares(task):
    grid = ["trainer.limit_train_batches=0,false,1,1.0"]
    assert len(plans_of(given(config=[str(task)], grid=grid), ("--model.method.rank", "4"))[0].points("lora")) == 4


def test_commas_inside_brackets_belong_to_a_value(task):
    (plan,) = plans_of(given(config=[str(task)], methods="lora, pissa", grid=["data.crop_scale=[0.5,1],[0.7,1]"]), ())
    assert list(plan.methods) == ["lora", "pissa"]
    assert plan.points("pissa") == [(("data.crop_scale", "[0.5,1]"),), (("data.crop_scale", "[0.7,1]"),)]


def compare(task: Path, output: Path, *more: str) -> list[str]:
    words = ["--config", str(task), "--methods", "lora,srlora", "--seeds", "2", "--output", str(output)]
    return ["compare", *words, *more]


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def table_and_scores(output: Path) -> tuple[str, list[dict[str, str]]]:
    with (output / "results.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory")} for row in csv.DictReader(file)]
    costs = r" [\d,]+ \| \d+\.\d\d \|$"  # seconds and GiB
    return re.sub(costs, "", (output / "results.md").read_text(), flags=re.MULTILINE), rows


def signalled(task: Path, output: Path, number: int, cell: str) -> tuple[int, str]:
    """Exit code and words of a comparison that gets signal ``number`` once ``cell`` has a checkpoint."""
    process = start(*compare(task, output))
    pattern = f"{cell}/*/version_0/checkpoints/*"
    wait_until(lambda: list(output.glob(pattern)) or process.poll() is not None, f"{output}/{pattern}")
    assert process.poll() is None, words_of(process)
    process.send_signal(number)
    said = words_of(process)
    return process.returncode, said


@pytest.mark.slow
def test_a_comparison_that_is_killed_and_started_again_ends_with_the_same_table(task, tmp_path, capsys):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert cli.main(compare(task, undisturbed)) == 0
    assert "paired t-test over 2 seeds" in capsys.readouterr().out
    first = killed / "lora-seed0"
    code, said = signalled(task, killed, signal.SIGTERM, "srlora-seed0")
    assert code == 143
    assert "interrupted by SIGTERM; the same command goes on from here" in said
    before = {file: file.stat().st_mtime_ns for file in first.rglob("*")}
    assert signalled(task, killed, signal.SIGKILL, "lora-seed1")[0] == -signal.SIGKILL
    said = []

    def goes_on() -> bool:
        code = cli.main(compare(task, killed))
        out, err = capsys.readouterr()
        said.append(err)
        assert code in (0, 2), f"{out}\n{err}"
        return code == 0

    wait_until(goes_on, "the run that the killed comparison has left behind")
    assert "a run that one has left behind, is at work in" in said[-2]  # lora-seed1, until it had finished
    assert {file: file.stat().st_mtime_ns for file in first.rglob("*")} == before  # not run again
    for cell in ("srlora-seed0", "lora-seed1"):
        assert len(list(killed.glob(f"{cell}/*/version_*"))) == 1  # gone on with
    assert table_and_scores(killed) == table_and_scores(undisturbed)
    about = json.loads((killed / "results.json").read_text())
    assert about["seeds"] == [0, 1]
    assert len(about["runs"]) == 4
    for kind in ("png", "svg"):
        assert (killed / f"training_loss.{kind}").stat().st_size > 1000


@pytest.mark.slow
def test_a_run_that_fails_is_reported_and_does_not_stop_the_rest(task, tmp_path, capsys):
    output = tmp_path / "out"
    overlay = tmp_path / "broken.yaml"
    overlay.write_text(
        "model: {init_args: {method: {class_path: srlora_pl.LoRA, init_args: {target_modules: [nothing]}}}}"
    )
    arguments = ["compare", "--config", str(task), "--methods", f"{overlay},pissa", "--seeds", "1"]
    assert cli.main([*arguments, "--output", str(output)]) == 1
    out = capsys.readouterr().out
    assert out.count("failed: broken-seed0: error: ") == out.count("error: ") == 1
    assert out.splitlines()[-1].startswith("1 of ")
    assert f"runs failed, as said above: {output / 'broken-seed0'}\n" in out
    assert "exit code 2" in out
    assert "log.txt" in out
    text, rows = table_and_scores(output)
    assert [row["cell"] for row in rows] == ["pissa-seed0"]
    line = "* broken is left out: 1 of its 1 runs with the first seed failed (broken-seed0): mend it, or "
    assert line in out
    assert line in text


def test_runs_of_other_settings_are_not_mixed(task, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    arguments = ["compare", "--config", str(task), "--seeds", "1", "--output", str(output)]
    (output / "lora-seed0/small-lora/version_0").mkdir(parents=True)
    (output / "plan.json").write_text(json.dumps({"files": {"config 1": "other"}, "options": []}))
    assert cli.main(arguments) == 2
    assert "holds runs with other config files or options" in capsys.readouterr().err
    (output / "plan.json").write_text(json.dumps({"files": {}, "options": ["--model.lr", "1"]}))
    assert cli.main(arguments) == 2
    assert "holds runs with other config files or options" in capsys.readouterr().err


@pytest.mark.slow
def test_a_mistyped_comparison_leaves_nothing_that_refuses_the_right_one(task, tmp_path, capsys):
    arguments = [
        "compare",
        "--config",
        str(task),
        "--methods",
        "pissa",
        "--seeds",
        "1",
        "--output",
        str(tmp_path / "out"),
    ]
    assert cli.main([*arguments, "--model.lrr", "1"]) == 1
    out = capsys.readouterr().out
    assert "--model.lrr is unknown" in out
    assert "results in" not in out
    assert cli.main(arguments) == 0
    assert "results in" in capsys.readouterr().out


def test_an_output_that_is_no_folder_is_refused(task, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["compare", "--config", str(task), "--output", str(tmp_path / "file")]) == 2
    assert "file cannot be written to (File exists): name another place" in capsys.readouterr().err


def test_a_task_whose_folder_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "deberta_qnli_srlora").touch()
    assert cli.main(["compare", "--table", "3", "--output", str(tmp_path)]) == 2
    assert "deberta_qnli_srlora cannot be written to (File exists): name another place" in capsys.readouterr().err


def test_two_comparisons_do_not_share_a_folder(task, tmp_path, capsys):
    with comparing_in(tmp_path):
        assert cli.main(["compare", "--config", str(task), "--seeds", "1", "--output", str(tmp_path)]) == 2
    assert "is at work in" in capsys.readouterr().err


def test_a_dry_run_lists_the_runs_and_trains_none(task, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(compare(task, output, "--grid", "model.lr=0.1,0.2", "--dry-run")) == 0
    out = capsys.readouterr().out
    assert f"{output}: 6 runs\n" in out
    assert "left, alone, about 0.0 h: 12 steps a run, " in out
    assert [line.strip() for line in out.splitlines() if line.strip().startswith(("lora", "srlora"))] == [
        "lora-lr0.1-seed0",
        "lora-lr0.2-seed0",
        "srlora-lr0.1-seed0",
        "srlora-lr0.2-seed0",
    ]
    assert "then each method's best point with seeds 1" in out
    assert not output.exists()


@pytest.mark.slow
def test_nothing_is_chosen_from_a_grid_with_a_hole(task, tmp_path, capsys):
    output = tmp_path / "out"
    finish(output, "lora-lr0.1-seed0")
    words = ["compare", "--config", str(task), "--methods", "lora", "--seeds", "2", "--output", str(output)]
    assert cli.main([*words, "--grid", "model.lr=0.1,-1"]) == 1
    out, text = capsys.readouterr().out, (output / "results.md").read_text()
    assert "failed: lora-lr-1-seed0: error: " in out
    assert text == (
        "No method has finished all its runs with the first seed, so there is nothing to compare.\n\n"
        "* lora is left out: 1 of its 2 runs with the first seed failed (lora-lr-1-seed0): mend it, or leave the value "
        "out of --grid or the method out of --methods.\n"
    )
    assert text in out
    assert not list(output.glob("*-seed1"))


@pytest.mark.slow
def test_a_grid_without_validation_ends_with_its_first_run(task, tmp_path, capsys):
    output = tmp_path / "out"
    words = compare(task, output, "--grid", "model.lr=0.1,0.2", "--data.val_fraction", "0")
    assert cli.main(words) == 2
    assert "a grid is chosen from by validation, but the runs have none" in capsys.readouterr().err
    assert [folder.name for folder in output.iterdir() if folder.is_dir()] == ["lora-lr0.1-seed0"]


@pytest.mark.slow
def test_a_dry_run_counts_the_micro_batches_of_a_step(task, tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(command.time, "perf_counter", lambda: float(next(clock)))
    for accumulated, seconds in ((1, 1.0), (3, 3.0)):
        options = ["--trainer.accumulate_grad_batches", str(accumulated)]
        plan = plans_of(given(config=[str(task)], methods="lora"), options)[0]
        assert command._probe(plan, plan.trials[0]) == (seconds, 12)


def test_the_name_of_a_cell_is_a_folder():
    assert Cell("own_0.1", (("data.root", "a/b"),), 3).name == "own_0.1-roota_b-seed3"  # own_0.01 is another


CELLS = ("lora-seed0", "srlora-seed0", "lora-seed1", "srlora-seed1")


def test_runs_too_short_for_a_training_loss_end_with_tables_and_no_figure(task, tmp_path, capsys):
    for cell in CELLS:
        finish(tmp_path / "out", cell, losses="")
    assert cli.main(compare(task, tmp_path / "out")) == 0
    assert "| lora | - | 2 | 50.00 ± 0.00 |" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("training_loss.*"))


def test_a_method_without_a_training_loss_is_left_out_of_the_figure(task, tmp_path, monkeypatch):
    drawn: list[str] = []
    draw = command.figures.training_loss
    monkeypatch.setattr(command.figures, "training_loss", lambda curves: drawn.extend(curves) or draw(curves))
    for cell in CELLS:
        finish(tmp_path / "out", cell, losses="" if cell.startswith("lora") else "1,2.5\n")
    assert cli.main(compare(task, tmp_path / "out")) == 0
    assert drawn == ["srlora"]
    assert (tmp_path / "out/training_loss.svg").is_file()


@pytest.mark.parametrize(("of", "share", "told"), [("GLUEData", 0.0, 1), ("GLUEData", 0.1, 0), ("ImageData", 0.0, 0)])
def test_a_choice_by_the_data_that_are_reported_is_told(of, share, told, task, tmp_path, capsys):
    output = tmp_path / "out"
    data = {"class_path": f"srlora_pl.{of}", "init_args": {"val_fraction": share}}
    for method, lr in itertools.product(("lora", "srlora"), ("0.1", "0.2")):
        finish(output, f"{method}-lr{lr}-seed0", data=data)
    words = compare(task, output, "--grid", "model.lr=0.1,0.2", "--seeds", "1")
    assert cli.main(words) == 0
    line = "* The grid was chosen from by the same data that the scores are of, so they flatter: set data.val_fraction"
    assert capsys.readouterr().out.count(line) == (output / "results.md").read_text().count(line) == told


def test_a_choice_by_validation_is_told_where_there_is_nothing_else_to_report(task, tmp_path, capsys):
    output = tmp_path / "out"
    for method, lr in itertools.product(("lora", "srlora"), ("0.1", "0.2")):
        finish(output, f"{method}-lr{lr}-seed0", scores={"val/score": 0.5, "val/accuracy": 0.5})
    assert cli.main(compare(task, output, "--grid", "model.lr=0.1,0.2", "--seeds", "1")) == 0
    assert "so they flatter: give the data a labelled test split.\n" in capsys.readouterr().out


def test_results_name_the_commits_and_versions_of_their_runs(task, tmp_path):
    output = tmp_path / "out"
    for cell, commit in zip(CELLS, ("abc", "abc", "def+", None), strict=True):
        finish(output, cell, commit=commit, versions={"torch": "2.1" if commit == "def+" else "2.0"})
    assert cli.main(compare(task, output)) == 0
    about = json.loads((output / "results.json").read_text())
    assert (about["commits"], about["versions"]) == (["abc", "def+", None], {"torch": ["2.0", "2.1"]})
    assert [run["commit"] for run in about["runs"]] == ["abc", "abc", "def+", None]
    assert "* Not all runs had the same commit, torch" in (output / "results.md").read_text()


def test_the_papers_numbers_stand_beside_those_of_its_own_tasks_only(tmp_path):
    own, name = ROOT / "configs/vit_cifar100_srlora.yaml", "vit_cifar100_srlora"

    def numbers(*files: Path, options: tuple[str, ...] = (), grid: tuple[str, ...] = ()) -> Any:
        return command._papers(plans_of(given(config=[str(file) for file in files], grid=grid), options)[0])

    (longer := tmp_path / "longer.yaml").write_text("trainer: {max_epochs: 9}")
    (other := tmp_path / "other.yaml").write_text("model: {init_args: {backbone: vit_tiny_in64}}")
    (copy := tmp_path / own.name).write_bytes(own.read_bytes())
    assert numbers(own) == numbers(own, longer) == numbers(copy) == NUMBERS[name]
    assert numbers(own, options=("--model.lr", "1")) == NUMBERS[name]
    assert numbers(own, options=("--model.backbone", "other")) == {}
    assert numbers(own, options=("--data.init_args.name=digits",)) == {}
    assert numbers(ROOT / "configs/deberta_cola_srlora.yaml", grid=("data.task=rte",)) == {}
    assert numbers(own, other) == {}
    copy.write_text(own.read_text().replace("lr: ", "lr: 1"))
    assert numbers(copy) == {}


def test_a_dry_run_counts_what_has_finished(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_probe", lambda plan, cell: (1.0, 12))
    output = tmp_path / "out"
    left = iter((5, 4, 3, 2, 1, 0))
    finish(output, "lora-lr0.1-seed1")  # not the best point
    scores = {"lora-lr0.1-seed0": 0.1, "lora-lr0.2-seed0": 0.2, "srlora-lr0.1-seed0": 0.4, "srlora-lr0.2-seed0": 0.3}
    for cell in (*scores, "lora-lr0.2-seed1", "srlora-lr0.1-seed1"):
        finish(output, cell, scores.get(cell, 0.5))
        assert cli.main(compare(task, output, "--grid", "model.lr=0.1,0.2", "--dry-run")) == 0
        assert f"training the {next(left)} that are left" in capsys.readouterr().out


def test_a_dry_run_lists_all_runs_before_it_tries_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "_probe", lambda plan, cell: print("trial") or (2.0, 900))
    assert cli.main(["compare", "--table", "4", "--seeds", "2", "--output", str(tmp_path), "--dry-run"]) == 0
    listed, *estimates = capsys.readouterr().out.split("trial\n")
    assert listed.splitlines() == [
        line
        for task in ("cifar100", "stl10", "mnist")
        for line in (
            f"{tmp_path}/vit_{task}_srlora: 4 runs",
            "  lora-seed0",
            "  srlora-seed0",
            "  then each method with seeds 1",
        )
    ]
    begin = f"{tmp_path}/vit_stl10_srlora: training the 4 that are left, alone, about 2.0 h: 900 steps a run, 2 s a "
    assert estimates[1].startswith(begin)


@pytest.mark.parametrize("settings", [{"backbone": "./nowhere"}, {"name": None, "root": "./nowhere"}])
def test_a_dry_run_says_what_an_estimate_lacks(settings, task, tmp_path, capsys):
    content = yaml.safe_load(task.read_text())
    content["model" if "backbone" in settings else "data"]["init_args"] |= settings
    task.write_text(yaml.safe_dump(content))
    assert cli.main(compare(task, tmp_path / "out", "--dry-run")) == 0
    listed, sentence = capsys.readouterr().out.split("  then each method with seeds 1\n")
    assert "  lora-seed0\n  srlora-seed0\n" in listed
    assert sentence.count("\n") == 1
    assert sentence.startswith(f"{tmp_path}/out: no estimate of the time: ")
    assert "'./nowhere'" in sentence
    assert "does not exist" in sentence
    assert not (tmp_path / "out").exists()


def test_a_dry_run_refuses_a_wrong_setting(task, tmp_path, capsys):
    assert cli.main(compare(task, tmp_path / "out", "--dry-run", "--model.lrr", "1")) == 2
    assert "model.lrr" in capsys.readouterr().err


def test_nothing_is_left_of_a_finished_comparison(monkeypatch):
    console = Console(file=io.StringIO(), width=200, get_time=itertools.count(0, 100).__next__)
    monkeypatch.setattr(rich.progress, "get_console", lambda: console)
    with command._progress() as bar:
        bar.advance(bar.add_task("lora-seed0", total=1))
    assert "left 0:00:00" in console.file.getvalue()


def test_scores_that_are_no_numbers_leave_valid_json(task, tmp_path):
    output = tmp_path / "out"
    for cell in CELLS:
        finish(output, cell)
        (file,) = output.glob(f"{cell}/*/version_0/summary.json")
        summary = json.loads(file.read_text())
        summary["scores"]["test/score"] = summary["scores"]["test/accuracy"] = float("nan")
        file.write_text(json_text.write(summary))
    assert cli.main(compare(task, output)) == 0
    text = (output / "results.json").read_text()
    assert "NaN" not in text
    about = json.loads(text)
    assert [run["test/score"] for run in about["runs"]] == [None] * 4
    assert about["not_finite"]["runs.3.test/score"] == "nan"
    table = (output / "results.md").read_text()
    assert "| lora | - | 2 | not finite | 2 |" in table
    assert "* lora against srlora: nothing can be tested" in table
