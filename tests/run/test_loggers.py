"""What each logger holds of a run, read back from its files."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_utilities.core.imports import RequirementCache
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from srlora_pl.reporting import ResumableCSVLogger, ResumableTensorBoardLogger
from srlora_pl.run import loggers
from tests.helpers.cli import SMALL_RUN, cli, complaint
from tests.helpers.wandb_file import config_and_history

SERVICES = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "MLFLOW_ALLOW_FILE_STORE": "true"}
ALL = ["TensorBoardLogger", "WandbLogger", {"class_path": "MLFlowLogger", "init_args": {"save_dir": "mlflow"}}]
FIT = ["fit", "--config", "small.yaml"]
LOGGED, VALIDATED = [1, 3, 5, 7, 9, 11], [3, 7, 11]


def prepared(home: Path, logger: Any) -> Path:
    settings = yaml.safe_load(SMALL_RUN)
    settings["trainer"] |= {"logger": logger, "enable_progress_bar": False}
    (home / "small.yaml").write_text(yaml.safe_dump(settings))
    return home


def fit(home: Path, *options: object, folder: str = "version_0") -> Path:
    code, _, err = cli(*FIT, *options, home=home)
    wandb.finish()
    assert code == 0, err
    return home / "runs/small-srlora" / folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a run with all loggers ended at step 8, and went on to step 12 with another ``max_steps``."""
    home = prepared(tmp_path_factory.mktemp("all"), ALL)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SERVICES.items():
            patch.setenv(name, value)
        wandb.teardown()  # it remembers its settings
        fit(home, "--trainer.max_steps", 8)
        fit(home, "--ckpt_path", "last")
        yield home
        wandb.teardown()


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[name])) for row in rows_of(folder) if row.get(name)]


def test_all_go_on_with_one_run(home: Path) -> None:
    folder = home / "runs/small-srlora/version_0"
    assert len(list(folder.parent.iterdir())) == 1
    ids = json.loads((folder / "loggers.json").read_text())
    assert set(ids) == {"WandbLogger", "ResumableMLFlowLogger"}
    assert {file.stem for file in home.glob("wandb/offline-run-*/*.wandb")} == {f"run-{ids['WandbLogger']}"}
    client = MlflowClient(f"file:{home}/mlflow")
    (run,) = client.search_runs([client.get_experiment_by_name("lightning_logs").experiment_id])
    assert run.info.run_id == ids["ResumableMLFlowLogger"]
    assert "id" not in (folder / "config.yaml").read_text().split()  # which may begin another run
    assert [step for step, _ in curve(folder, "train/loss")] == LOGGED
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == LOGGED


def test_mlflow_has_numbers_settings_figures_and_texts(home: Path) -> None:
    folder = home / "runs/small-srlora/version_0"
    client = MlflowClient(f"file:{home}/mlflow")
    run = client.get_run(json.loads((folder / "loggers.json").read_text())["ResumableMLFlowLogger"])

    def shown(name: str) -> list[tuple[int, float]]:
        return [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)]

    for name in ("train/loss", "val/loss", "scores/mlp.fc1", "age/initial", "lr-AdamW/pg1"):
        assert shown(name) == curve(folder, name), name
    assert [step for step, _ in shown("time/step")] == LOGGED
    assert shown("scores/attn.qkv.q") == curve(folder, "scores/attn.qkv[q]")
    settings = {"lr": "0.01", "method/init_args/target_rank": "12", "seed": "3", "batch_size": "32", "max_steps": "8"}
    assert settings.items() <= run.data.params.items()
    names = [each.path for place in ("", "figures") for each in client.list_artifacts(run.info.run_id, place)]
    assert {"config_step_0.md", "run_step_0.md", "figures/length_variance_step_12.png"} <= set(names)
    assert run.info.status == "FINISHED"


def test_wandb_has_numbers_histograms_settings_figures_and_texts(home: Path) -> None:
    folder = home / "runs/small-srlora/version_0"
    first, second = (config_and_history(file) for file in sorted(home.glob("wandb/offline-run-*/*.wandb")))
    rows = [*first[1], *second[1]]

    def shown(name: str) -> list[tuple[int, Any]]:
        return [(row["trainer/global_step"], row[name]) for row in rows if name in row]

    for name in ("train/loss", "val/loss", "scores/attn.qkv[q]", "age/initial"):
        assert shown(name) == curve(folder, name), name
    counts = shown("log10_scores/mlp.fc1.values")
    assert [step for step, _ in counts] == LOGGED
    assert {sum(values) for _, values in counts} == {2 * 4}  # pairs of two matrices
    (*_, (step, files)) = shown("figures/length_variance.filenames")
    assert step == 12
    assert list(home.glob(f"wandb/offline-run-*/files/{files[0]}"))
    assert first[0]["lr"] == 0.01
    assert first[0]["method"]["init_args"]["target_rank"] == 12
    assert (first[0]["max_steps"], second[0]["max_steps"]) == (8, 12)
    assert list(home.glob("wandb/offline-run-*/files/media/table/config_*.table.json"))


def test_without_loggers_a_run_has_its_metrics_and_the_figures_need_no_more(tmp_path: Path) -> None:
    folder = fit(prepared(tmp_path, False))
    assert not list(folder.glob("events*"))
    assert {file.name for file in folder.iterdir()} == {"checkpoints", "config.yaml", "metrics.csv", "summary.json"}
    assert curve(folder, "val/loss")[-1][0] == 11
    assert curve(folder, "scores/mlp.fc1")
    code, out, err = cli("figures", "--run", folder, home=tmp_path)
    assert code == 0, err
    assert "training_loss.png" in out


def test_a_place_of_the_users_own_is_left_to_lightning(tmp_path: Path) -> None:
    options = ["--trainer.logger.save_dir", "curves", "--trainer.max_steps=6", "--trainer.limit_test_batches=1"]
    folder = fit(prepared(tmp_path, "TensorBoardLogger"), *options)
    assert list(tmp_path.glob("curves/lightning_logs/version_0/events*"))
    assert (folder / "metrics.csv").is_file()
    assert not list(folder.glob("events*"))


def test_checkpoints_of_the_user_lie_in_the_runs_folder_whatever_logs(tmp_path: Path) -> None:
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "curves"}}
    saves = "--trainer.callbacks={class_path: ModelCheckpoint, init_args: {every_n_train_steps: 2, filename: mine}}"
    folder = fit(prepared(tmp_path, logger), saves, "--trainer.max_steps=6", "--trainer.limit_test_batches=1")
    assert (folder / "checkpoints/mine.ckpt").is_file()


OURS = "srlora_pl.reporting.ResumableTensorBoardLogger"
DIR = {"class_path": "CSVLogger", "init_args": {"save_dir": "x"}}


@pytest.mark.parametrize(
    ("given", "options", "expected", "words"),
    [
        ("TensorBoardLogger", [], OURS, []),
        ("lightning.pytorch.loggers.TensorBoardLogger", ["--a", "b"], OURS, ["--a", "b"]),
        (["WandbLogger", {"class_path": "TensorBoardLogger"}], [], ["WandbLogger", {"class_path": OURS}], []),
        (DIR, [], DIR, []),
        (False, ["--trainer.logger", "TensorBoardLogger"], False, ["--trainer.logger", OURS]),
        (None, ["--trainer.logger=[TensorBoardLogger]"], None, [f'--trainer.logger=["{OURS}"]']),
        (None, ["--trainer.logger+=TensorBoardLogger"], None, [f"--trainer.logger+={OURS}"]),
        (None, ["--trainer.logger", "[CSVLogger"], None, ["--trainer.logger", "[CSVLogger"]),
        (None, ["--trainer.logger", "WandbLogger"], None, ["--trainer.logger", "WandbLogger"]),
        (
            "CSVLogger",
            ["--trainer.logger.save_dir=x"],
            "CSVLogger",
            ["--trainer.logger.save_dir=x"],
        ),
    ],
)
def test_loggers_without_a_place_are_those_of_the_runs_folder(
    given: Any, options: list[str], expected: Any, words: list[str]
) -> None:
    settings = {"trainer": {"logger": given, "max_steps": 3}}
    found, rest = loggers.resumable(settings, options)
    assert found == {"trainer": {"logger": expected, "max_steps": 3}}
    assert rest == words
    assert settings["trainer"]["logger"] == given


def test_the_loggers_of_a_run(tmp_path: Path) -> None:
    theirs, own = CSVLogger(tmp_path), TensorBoardLogger(tmp_path)
    for given in (None, True, ResumableTensorBoardLogger(), [ResumableCSVLogger(), ResumableTensorBoardLogger()]):
        board, table = loggers.of_run(given, tmp_path / "version_3")
        assert (type(board), type(table)) == (ResumableTensorBoardLogger, ResumableCSVLogger)
        assert {board.log_dir, table.save_dir} == {str(tmp_path / "version_3")}
    *users, table = loggers.of_run([theirs, own], tmp_path)
    assert users == [theirs, own]
    assert [type(each) for each in loggers.of_run(False, tmp_path)] == [ResumableCSVLogger]
    # Nothing but a place of its own can take the scores of a test.
    assert loggers.of_run(None, None) is loggers.of_run(ResumableTensorBoardLogger(), None) is False
    assert loggers.of_run([theirs, ResumableCSVLogger()], None) == [theirs]


@pytest.mark.parametrize(
    ("logger", "says"),
    [
        ("WandbLogger", "W&B refuses: No API key configured"),
        ("MLFlowLogger", "MLflow refuses: The filesystem tracking backend"),
    ],
)
def test_a_service_that_is_not_set_up(logger: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SERVICES, "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where W&B's key would be
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # it remembers its settings
    code, _, err = cli(*FIT, home=prepared(tmp_path, logger))
    assert code == 2
    assert says in complaint(err)
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(("logger", "package"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow")])
def test_a_package_that_is_not_installed(
    logger: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = RequirementCache(f"{package}>=999")
    monkeypatch.setattr(f"lightning.pytorch.loggers.{package}._{package.upper()}_AVAILABLE", missing)
    code, _, err = cli(*FIT, home=prepared(tmp_path, logger))
    assert code == 2
    assert f"{logger} needs the package {package}" in complaint(err)
    assert f"pip install {package}," in complaint(err)
    assert not list(tmp_path.glob("runs/*"))
