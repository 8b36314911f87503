"""The command line: a whole small run through `main`, and what it leaves behind."""

import contextlib
import csv
import io
import json
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from srlora_pl import ImageClassifier
from srlora_pl.cli import main
from srlora_pl.data.images.sources import Digits
from srlora_pl.run.run import Run
from tests.helpers import waiting
from tests.helpers.cli import LORA, SMALL_RUN, cli, scores
from tests.helpers.paths import ROOT


@dataclass
class Finished:
    """A run of SMALL_RUN in a folder of its own."""

    home: Path
    out: str
    err: str

    @property
    def folder(self) -> Path:
        return self.home / "runs/small-srlora/version_0"

    @property
    def best(self) -> Path:
        return next(self.folder.glob("checkpoints/best-*.ckpt"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    home = tmp_path_factory.mktemp("run")
    (home / "small.yaml").write_text(SMALL_RUN)
    code, out, err = cli("fit", "--config", "small.yaml", home=home)
    assert code == 0, err
    return Finished(home, out, err)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """An empty folder with small.yaml."""
    (tmp_path / "small.yaml").write_text(SMALL_RUN)
    return tmp_path


# -- a run and what it leaves


def test_fit_writes_its_run_folder(run: Finished) -> None:
    assert {path.name for path in run.folder.glob("checkpoints/*")} == {run.best.name, "last.ckpt"}
    settings = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert settings["trainer"]["max_steps"] == 12
    assert settings["trainer"]["use_distributed_sampler"] is False
    assert settings["model"]["init_args"]["method"]["init_args"]["target_rank"] == 12
    assert "ckpt_path" not in settings


def test_fit_logs_curves(run: Finished) -> None:
    events = EventAccumulator(str(run.folder)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "val/accuracy", "lr-AdamW", "srlora/switches", "test/accuracy"} <= tags
    assert [event.step for event in events.Scalars("val/loss")] == [3, 7, 11]
    # (12 - 4) / (0.5 * 4) = 4 switches are planned; the one at the last step is left out.
    # They fall after steps 3, 6 and 9; every second step says how many are done once it is over.
    assert [event.value for event in events.Scalars("srlora/switches")] == [0, 1, 2, 2, 3, 3]
    with (run.folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert losses == pytest.approx([event.value for event in events.Scalars("val/loss")])


def test_a_run_shorter_than_its_validation_interval_has_scores_and_a_best_checkpoint(small: Path) -> None:
    """In the middle of the first epoch; the interval is an epoch, as in most configs."""
    interval = ["--trainer.val_check_interval", 1.0, "--trainer.check_val_every_n_epoch", 1]
    code, _, err = cli("fit", "--config", "small.yaml", "--trainer.max_steps", 6, *interval, home=small)
    assert code == 0, err
    summary = json.loads((small / "runs/small-srlora/version_0/summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["best"]["checkpoint"].endswith("best-step6.ckpt")
    assert {"test/loss", "test/accuracy"} <= set(summary["scores"])


def test_a_run_without_validation_chooses_nothing_and_warns_of_nothing(small: Path) -> None:
    interval = ["--trainer.val_check_interval", 1.0, "--trainer.check_val_every_n_epoch", 1]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        code, out, err = cli("fit", "--config", "small.yaml", "--data.val_fraction", 0, *interval, home=small)
    assert code == 0, err
    assert "no checkpoint was chosen by validation" in out
    assert not [each for each in warned if "could not find the monitored key" in str(each.message)]


def test_best_is_the_lowest_validation_loss(run: Finished) -> None:
    events = EventAccumulator(str(run.folder)).Reload()
    best = min(events.Scalars("val/loss"), key=lambda event: event.value)
    assert run.best.name == f"best-step{best.step + 1}.ckpt"
    assert f"{run.best.relative_to(run.home)} (val/loss {best.value:.4f})" in run.out


def test_fit_ends_with_scores_and_place(run: Finished) -> None:
    events = EventAccumulator(str(run.folder)).Reload()
    logged = {name: events.Scalars(name)[-1].value for name in ("test/accuracy", "test/loss", "test/top5")}
    printed = scores(run.out)
    assert {name: printed[name] for name in logged} == pytest.approx(logged, abs=5.1e-5)
    assert run.out.rstrip().endswith("run written to runs/small-srlora/version_0")
    assert "attn.qkv[k]" not in run.out  # enable_model_summary is false
    assert "Traceback" not in run.err


@pytest.mark.slow
def test_a_new_process_gives_the_same_score(run: Finished) -> None:
    command = [sys.executable, ROOT / "cli.py", "test", "--config", run.folder / "config.yaml", "--ckpt_path", run.best]
    done = waiting.run(command, cwd=run.home)
    assert done.returncode == 0, done.stderr
    assert scores(done.stdout) == scores(run.out)
    assert len(scores(done.stdout)) == 4


def test_fit_scores_the_best_checkpoint_not_the_last(small: Path) -> None:
    # The loss falls, so the highest one is the first.
    worst = [f"--trainer.callbacks{each}" for each in ("+=ModelCheckpoint", ".monitor=val/loss", ".mode=max")]
    code, out, err = cli("fit", "--config", "small.yaml", *worst, home=small)
    assert code == 0, err
    chosen = re.search(r"best checkpoint: (\S+)", out)
    assert chosen
    assert "step=4" in chosen[1]
    again = cli("test", "--config", "small.yaml", "--ckpt_path", chosen[1], home=small)[1]
    assert scores(out) == scores(again)


def test_validate_gives_the_best_loss(run: Finished) -> None:
    code, out, _ = cli("validate", "--config", "small.yaml", "--ckpt_path", run.best, home=run.home)
    assert code == 0
    assert f"(val/loss {scores(out)['val/loss']:.4f})" in run.out


def test_commands_other_than_fit_make_no_run(run: Finished) -> None:
    before = sorted(run.home.rglob("*"))
    assert cli("test", "--config", "small.yaml", "--ckpt_path", run.best, home=run.home)[0] == 0
    assert sorted(run.home.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("fit", "data: 1,293 to train on, 144 to validate; 10 classes: 0 (128), 1 (131), "),
        ("validate", "data: 1,293 to train on, 144 to validate; 10 classes: 0 (128), 1 (131), "),
        ("test", "data: 360 to test; 10 classes: 0 (36), 1 (36), "),
        ("predict", "data: 360 to predict; 10 classes: 0, 1, "),
    ],
)
def test_every_run_says_in_one_line_what_its_data_are(command: str, expected: str, run: Finished) -> None:
    out = run.out
    if command != "fit":
        out = cli(command, "--config", "small.yaml", "--ckpt_path", run.best, home=run.home)[1]
    lines = [line for line in out.splitlines() if line.startswith("data: ")]
    assert len(lines) == 1
    assert lines[0].startswith(expected)


def test_predict_writes_the_test_split(run: Finished, tmp_path: Path) -> None:
    target = tmp_path / "deep/out.csv"
    code, out, err = cli(
        "predict", "--config", "small.yaml", "--ckpt_path", run.best, "--output", target, home=run.home
    )
    assert code == 0, err
    assert f"360 predictions written to {target}" in out
    with target.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["sample"] for row in rows] == [str(i) for i in range(360)]
    assert {row["label"] for row in rows} <= {str(digit) for digit in range(10)}
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)
    code, out, _ = cli(
        "test", "--config", "small.yaml", "--ckpt_path", run.best, "--trainer.limit_test_batches=null", home=run.home
    )
    assert code == 0
    right = [int(row["label"]) for row in rows] == Digits().load("test").labels.numpy()
    assert scores(out)["test/accuracy"] == pytest.approx(right.mean(), abs=5.1e-5)


def test_a_part_of_the_predictions_is_said_to_be_one(run: Finished, tmp_path: Path) -> None:
    options = ["--config", "small.yaml", "--ckpt_path", run.best, "--output", tmp_path / "out.csv"]
    code, out, err = cli("predict", *options, "--trainer.limit_predict_batches", 2, home=run.home)
    assert code == 0, err
    assert "\n64 of 360 predictions written to " in out


def test_predict_takes_a_folder_or_one_file(run: Finished, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    (pictures / "deeper").mkdir(parents=True)
    Image.new("L", (20, 30), 200).save(pictures / "a.png")
    Image.new("RGB", (8, 8), "red").save(pictures / "deeper/b.jpg")
    options = ["--config", "small.yaml", "--ckpt_path", run.best, "--output", tmp_path / "out.csv"]
    for root, expected in ((pictures, ["a.png", "b.jpg"]), (pictures / "a.png", ["a.png"])):
        code, _, err = cli("predict", *options, "--data.predict_root", root, home=run.home)
        assert code == 0, err
        with (tmp_path / "out.csv").open() as file:
            assert [Path(row["sample"]).name for row in csv.DictReader(file)] == expected


def test_own_pictures_are_predicted_without_the_data_of_the_training(run: Finished, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    options = ["--config", "small.yaml", "--ckpt_path", run.best, "--data.predict_root", tmp_path]
    written = []
    for gone in ([], ["--data.name=null", "--data.root=gone"]):
        file = tmp_path / f"{len(written)}.csv"
        code, _, err = cli("predict", *options, *gone, "--output", file, home=run.home)
        assert code == 0, err
        written.append(file.read_text())
    assert written[0] == written[1]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such name")
def test_names_that_are_not_utf8_are_predicted_and_written(
    run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (20, 30)).save(tmp_path / "photos" / "caf\udce9.png")
    out = tmp_path / "caf\udce9.csv"
    options = ["--ckpt_path", run.best, "--data.predict_root", tmp_path / "photos", "--output", out]
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, "utf-8", write_through=True))
    with contextlib.chdir(run.home):
        assert main(["predict", "--config", "small.yaml", *map(str, options)]) == 0
    (row,) = csv.DictReader(out.open(newline=""))
    assert row["sample"] == f"{tmp_path}/photos/caf\\udce9.png"
    assert rb"written to " in screen.getvalue()
    assert rb"caf\udce9.csv" in screen.getvalue()


def test_predictions_go_to_the_run_by_default(run: Finished) -> None:
    code, out, _ = cli("predict", "--config", "small.yaml", "--ckpt_path", run.best, home=run.home)
    assert code == 0
    assert "predictions written to runs/small-srlora/version_0/predictions.csv" in out
    (run.folder / "predictions.csv").unlink()


def test_resume_goes_on_in_its_own_folder(small: Path) -> None:
    code, _, err = cli("fit", "--config", "small.yaml", "--trainer.max_steps", 8, home=small)
    assert code == 0, err
    folder = small / "runs/small-srlora/version_0"
    last = folder / "checkpoints/last.ckpt"
    code, out, err = cli("fit", "--config", "small.yaml", "--name", "elsewhere", "--ckpt_path", last, home=small)
    assert code == 0, err
    assert "note: the run in runs/small-srlora/version_0 keeps its name, small" in err
    assert "note: other settings than the run had so far: trainer.max_steps 12 (was 8)\n" in err
    assert yaml.safe_load((folder / "config.yaml").read_text())["name"] == "small"
    assert "run written to runs/small-srlora/version_0" in out
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
    assert len(list(folder.glob("checkpoints/*"))) == 2
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [3, 7, 11]
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [3, 7, 11]
    assert torch.load(last, weights_only=True)["global_step"] == 12


def test_two_processes_do_not_go_on_with_one_run(small: Path) -> None:
    assert cli("fit", "--config", "small.yaml", home=small)[0] == 0
    (folder,) = small.glob("runs/*/version_0")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hold = (
        "import sys, pathlib; from srlora_pl.util.files import alone_in\n"
        "with alone_in(pathlib.Path(sys.argv[1])): print('alone', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "alone\n"
        code, _, err = cli("fit", "--config", "small.yaml", "--ckpt_path", "last", home=small)
        assert code == 2
        assert "another run is at work in runs/" in err
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before | {
            folder / ".lock": b""
        }
        other.kill()  # what a dead process held is free
    assert cli("fit", "--config", "small.yaml", "--ckpt_path", "last", home=small)[0] == 0
    assert not (folder / ".lock").exists()


def test_last_is_renewed_though_nothing_gets_better(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(self: ImageClassifier, batch: dict[str, Tensor]) -> Tensor:
        if self.global_step == 10:
            raise KeyError("a bug")
        return original(self, batch)

    original = ImageClassifier.training_loss
    monkeypatch.setattr(ImageClassifier, "training_loss", loss)
    worst = [f"--trainer.callbacks{each}" for each in ("+=ModelCheckpoint", ".monitor=val/loss", ".mode=max")]
    with pytest.raises(KeyError):
        cli("fit", "--config", "small.yaml", *worst, home=small)
    folder = small / "runs/small-srlora/version_0/checkpoints"
    steps = {file.stem: torch.load(file, weights_only=True)["global_step"] for file in folder.iterdir()}
    assert steps.pop("last") == 8
    assert list(steps.values()) == [4]


def test_last_is_that_of_the_last_step(small: Path) -> None:
    assert cli("fit", "--config", "small.yaml", "--trainer.max_steps=10", home=small)[0] == 0
    last = small / "runs/small-srlora/version_0/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 10


def test_last_is_renewed_after_the_last_validation(run: Finished) -> None:
    last = torch.load(run.folder / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 12
    assert not last["exact_resume"]["owes_validation"]


def test_resume_from_best_keeps_one_last(small: Path) -> None:
    # At its first save the best file does not know yet that there will be a last one.
    assert cli("fit", "--config", "small.yaml", "--config", LORA, "--trainer.max_steps", 4, home=small)[0] == 0
    folder = small / "runs/small-lora/version_0/checkpoints"
    best = next(folder.glob("best-*"))
    code, _, err = cli("fit", "--config", "small.yaml", "--config", LORA, "--ckpt_path", best, home=small)
    assert code == 0, err
    assert [path.name for path in folder.glob("last*")] == ["last.ckpt"]


def test_a_moved_run_goes_on_with_its_best(small: Path) -> None:
    assert cli("fit", "--config", "small.yaml", "--trainer.max_steps", 8, home=small)[0] == 0
    moved = (small / "runs").rename(small / "moved") / "small-srlora/version_0"
    code, out, err = cli("fit", "--config", "small.yaml", "--ckpt_path", moved / "checkpoints/last.ckpt", home=small)
    assert code == 0, err
    assert "best checkpoint: moved/small-srlora/version_0/checkpoints/best-step" in out
    assert len(list(moved.glob("checkpoints/*"))) == 2  # the loss has fallen, and the best of before is gone
    assert not (small / "runs").exists()


def test_a_second_run_takes_the_next_version(small: Path) -> None:
    (small / "runs/small-srlora/version_4").mkdir(parents=True)
    code, out, _ = cli("fit", "--config", "small.yaml", "--trainer.max_steps=4", "--name", "other", home=small)
    assert code == 0
    assert "run written to runs/other-srlora/version_0" in out
    code, out, _ = cli("fit", "--config", "small.yaml", "--trainer.max_steps=4", home=small)
    assert code == 0
    assert "run written to runs/small-srlora/version_5" in out


def test_overlay_names_the_folder_and_makes_no_switch(small: Path) -> None:
    code, out, err = cli("fit", "--config", "small.yaml", "--config", LORA, home=small)
    assert code == 0, err
    assert "dropped" not in err
    assert "run written to runs/small-lora/version_0" in out
    events = EventAccumulator(str(small / "runs/small-lora/version_0")).Reload()
    assert {event.value for event in events.Scalars("srlora/switches")} == {0}


# -- settings


def test_command_line_rules_over_the_checkpoint(run: Finished) -> None:
    options = ["--ckpt_path", str(run.best), "--model.label_smoothing", "0.25"]
    model = Run("test", ["small.yaml"], [yaml.safe_load(SMALL_RUN)], options).model
    assert model.label_smoothing == 0.25


def test_default_callbacks_survive_the_users(small: Path) -> None:
    options = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    with contextlib.chdir(small):
        trainer = Run("fit", ["small.yaml"], [yaml.safe_load(SMALL_RUN)], options).trainer
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert {"EarlyStopping", "LearningRateMonitor", "ModelCheckpoint"} <= set(names)
    assert names.count("ModelCheckpoint") == 1
    assert names.count("Last") == 1


def test_a_users_checkpoint_that_chooses_takes_the_place_of_ours(small: Path) -> None:
    options = [f"--trainer.callbacks{each}" for each in ("+=ModelCheckpoint", ".monitor=val/accuracy", ".mode=max")]
    with contextlib.chdir(small):
        trainer = Run("fit", ["small.yaml"], [yaml.safe_load(SMALL_RUN)], options).trainer
    assert {callback.monitor for callback in trainer.checkpoint_callbacks} == {"val/accuracy", None}


def test_a_users_checkpoint_that_only_saves_joins_ours(small: Path) -> None:
    options = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=5"]
    code, out, err = cli("fit", "--config", "small.yaml", *options, home=small)
    assert code == 0, err
    assert re.search(r"best checkpoint: \S+/best-step\d+\.ckpt \(val/loss", out)
    assert len(list(small.glob("runs/small-srlora/version_0/checkpoints/*"))) == 3


def test_16_bit_on_a_cpu_is_a_notice(small: Path) -> None:
    options = ["--trainer.precision", "16-mixed", "--trainer.max_steps", 4]
    code, _, err = cli("fit", "--config", "small.yaml", *options, home=small)
    assert code == 0, err
    assert "note: 16-mixed needs a GPU, on this CPU the run uses bf16-mixed" in err


def test_fast_dev_run_writes_nothing(small: Path) -> None:
    code, out, err = cli("fit", "--config", "small.yaml", "--trainer.fast_dev_run", "true", home=small)
    assert code == 0, err
    assert "test/accuracy" in scores(out)
    assert [path.name for path in small.iterdir()] == ["small.yaml"]


# -- help


def test_help_is_there_at_once() -> None:
    code = "import sys; from srlora_pl.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = waiting.run([sys.executable, "-c", code], check=True)
    for command in ("fit", "validate", "test", "predict"):
        assert command in done.stdout


def test_help_of_a_subcommand_and_of_a_class(small: Path) -> None:
    code, out, _ = cli("fit", "--help", home=small)
    assert code == 0
    assert "--trainer.max_steps" in out
    code, out, _ = cli("fit", "--model.help", "srlora_pl.ImageClassifier", home=small)
    assert code == 0
    assert "--model.label_smoothing" in out


def test_printed_config_is_the_same_config(small: Path) -> None:
    code, out, _ = cli("fit", "--config", "small.yaml", "--model.lr", "0.5", "--print_config", home=small)
    assert code == 0
    settings = yaml.safe_load(out)
    assert settings["model"]["init_args"]["lr"] == 0.5
    (small / "printed.yaml").write_text(out)
    assert cli("fit", "--config", "printed.yaml", "--print_config", home=small) == (0, out, "")


# -- what is no bad input (that is in test_bad_input.py)


def test_a_bug_keeps_its_traceback(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Run) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(Run, "fit", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli("fit", "--config", "small.yaml", home=small)


def test_an_interrupt_is_a_word(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(self: Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "fit", stopped)
    code, _, err = cli("fit", "--config", "small.yaml", home=small)
    assert code == 130
    assert err.splitlines()[-1] == "interrupted"
