"""The compare command, on short real runs."""

import csv
import json
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from srlora_pl import cli
from srlora_pl.comparison import command
from srlora_pl.comparison.cells import Cell
from srlora_pl.comparison.command import plans_of
from srlora_pl.errors import UserError

ROOT = Path(__file__).parents[2]


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


def test_a_plan_is_the_grid_with_one_seed_and_the_best_points_with_the_others(task):
    options = given(config=[str(task)], methods="lora,srlora", seeds=3, grid=["model.lr=0.1,1e-2", "data.batch_size=4"])
    (plan,) = plans_of(options, ("--data.num_workers", "0"))
    assert [cell.name for cell in plan.trials] == [
        "lora-lr0.1-batch_size4-seed0",
        "lora-lr1e-2-batch_size4-seed0",
        "srlora-lr0.1-batch_size4-seed0",
        "srlora-lr1e-2-batch_size4-seed0",
    ]
    best = {"lora": plan.points[1], "srlora": plan.points[0]}
    assert [cell.name for cell in plan.repetitions(best)] == [
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
        ({}, "needs --config FILE or --table 3|4"),
        ({"config": ["TASK"], "table": "3"}, "not both"),
        ({"table": "5"}, "--table is 5, but compare knows the paper's tables 3 and 4"),
        ({"config": ["TASK"], "seeds": 0}, "--seeds is 0"),
        ({"config": ["TASK"], "methods": "lora,srlra"}, r"no configs/methods/srlra\.yaml \(did you mean 'srlora'\?\)"),
        ({"config": ["TASK"], "methods": "lora,lora"}, "names lora twice"),
        ({"config": ["TASK"], "grid": ["model.lr"]}, "must be a setting and its values"),
        ({"config": ["TASK"], "grid": ["model.lr=1,1"]}, "names a value twice"),
        ({"config": ["TASK"], "grid": ["model.lr=1", "model.lr=2"]}, "--grid gives model.lr twice"),
        ({"config": ["TASK"], "methods": "lora,"}, "--methods has an empty name"),
    ],
)
def test_what_cannot_be_compared_is_refused(values, words, task):
    values = {key: [str(task)] if value == ["TASK"] else value for key, value in values.items()}
    with pytest.raises(UserError, match=words):
        plans_of(given(**values), ())


def test_commas_inside_brackets_belong_to_a_value(task):
    (plan,) = plans_of(given(config=[str(task)], methods="lora, pissa", grid=["data.crop_scale=[0.5,1],[0.7,1]"]), ())
    assert list(plan.methods) == ["lora", "pissa"]
    assert plan.points == [(("data.crop_scale", "[0.5,1]"),), (("data.crop_scale", "[0.7,1]"),)]


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
    return (output / "results.md").read_text(), rows


def signalled(task: Path, output: Path, number: int, cell: str) -> tuple[int, str]:
    """Exit code and words of a comparison that gets signal ``number`` once ``cell`` has a checkpoint."""
    process = start(*compare(task, output))
    while not list(output.glob(f"{cell}/*/version_0/checkpoints/*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate()[0]
    return process.returncode, said


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
    said = ""
    while (code := cli.main(compare(task, killed))) == 2:
        said = capsys.readouterr().err
        time.sleep(0.1)
    assert code == 0
    assert "a run that one has left behind, is at work in" in said  # lora-seed1, until it had finished
    assert {file: file.stat().st_mtime_ns for file in first.rglob("*")} == before  # not run again
    for cell in ("srlora-seed0", "lora-seed1"):
        assert len(list(killed.glob(f"{cell}/*/version_*"))) == 1  # gone on with
    assert table_and_scores(killed) == table_and_scores(undisturbed)
    about = json.loads((killed / "results.json").read_text())
    assert about["seeds"] == [0, 1]
    assert len(about["runs"]) == 4
    for kind in ("png", "svg"):
        assert (killed / f"training_loss.{kind}").stat().st_size > 1000


def test_a_run_that_fails_is_reported_and_does_not_stop_the_rest(task, tmp_path, capsys):
    output = tmp_path / "out"
    overlay = tmp_path / "broken.yaml"
    overlay.write_text(
        "model: {init_args: {method: {class_path: srlora_pl.LoRA, init_args: {target_modules: [nothing]}}}}"
    )
    arguments = ["compare", "--config", str(task), "--methods", f"{overlay},pissa", "--seeds", "1"]
    assert cli.main([*arguments, "--output", str(output)]) == 1
    out = capsys.readouterr().out
    assert "failed: broken-seed0: error: " in out
    assert "exit code 2" in out
    assert "log.txt" in out
    _, rows = table_and_scores(output)
    assert [row["cell"] for row in rows] == ["pissa-seed0"]


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
    assert "file cannot be written to (File exists): give another folder" in capsys.readouterr().err


def test_a_task_whose_folder_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "deberta_qnli_srlora").touch()
    assert cli.main(["compare", "--table", "3", "--output", str(tmp_path)]) == 2
    assert "deberta_qnli_srlora cannot be written to (File exists): give another folder" in capsys.readouterr().err


def test_two_comparisons_do_not_share_a_folder(task, tmp_path, capsys):
    from srlora_pl.comparison.cells import runner

    with runner(tmp_path):
        assert cli.main(["compare", "--config", str(task), "--seeds", "1", "--output", str(tmp_path)]) == 2
    assert "is at work in" in capsys.readouterr().err


def test_a_dry_run_lists_the_runs_and_trains_none(task, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(compare(task, output, "--grid", "model.lr=0.1,0.2", "--dry-run")) == 0
    out = capsys.readouterr().out
    assert f"{output}: 6 runs of 12 steps" in out
    assert [line.strip() for line in out.splitlines() if line.strip().startswith(("lora", "srlora"))] == [
        "lora-lr0.1-seed0",
        "lora-lr0.2-seed0",
        "srlora-lr0.1-seed0",
        "srlora-lr0.2-seed0",
    ]
    assert "then each method's best point with seed 1" in out
    assert not output.exists()


def test_nothing_is_chosen_from_a_grid_with_a_hole(task, tmp_path, capsys):
    output = tmp_path / "out"
    words = ["compare", "--config", str(task), "--methods", "lora", "--seeds", "2", "--output", str(output)]
    assert cli.main([*words, "--grid", "model.lr=0.1,-1"]) == 1
    assert "failed: lora-lr-1-seed0: error: " in capsys.readouterr().out
    assert (output / "lora-lr0.1-seed0").is_dir()
    assert not list(output.glob("*-seed1"))


def test_a_grid_without_validation_ends_with_its_first_run(task, tmp_path, capsys):
    output = tmp_path / "out"
    words = compare(task, output, "--grid", "model.lr=0.1,0.2", "--data.val_fraction", "0")
    assert cli.main(words) == 2
    assert "a grid is chosen from by validation, but the runs have none" in capsys.readouterr().err
    assert [folder.name for folder in output.iterdir() if folder.is_dir()] == ["lora-lr0.1-seed0"]


def test_a_dry_run_counts_the_micro_batches_of_a_step(task, tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(command.time, "perf_counter", lambda: float(next(clock)))
    for accumulated, seconds in ((1, 1.0), (3, 3.0)):
        options = ["--trainer.accumulate_grad_batches", str(accumulated)]
        plan = plans_of(given(config=[str(task)], methods="lora"), options)[0]
        assert command._probe(plan, plan.trials[0]) == (seconds, 12)


def test_the_name_of_a_cell_is_a_folder():
    assert Cell("my/own.yaml", (("data.root", "a/b"),), 3).name == "own-roota_b-seed3"
