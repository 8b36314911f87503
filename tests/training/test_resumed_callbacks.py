"""What a run that goes on takes from its callbacks' saved states, from its files and from a search before it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from srlora_pl.run.config import Node
from srlora_pl.run.finders import Finder
from srlora_pl.training.checkpoints import keep_to_own_folders, newest, resumes, run_folders
from tests.helpers.checkpoints import content
from tests.helpers.cli import LORA, SMALL_RUN, cli, scores

FIT = ["fit", "--config", "small.yaml", "--config", LORA, "--config", "callback.yaml"]
FAST = """
  limit_val_batches: 1
  limit_test_batches: 1
  val_check_interval: 2
  logger: false
"""
HOME = "runs/small-lora/version_0"


def write(home: Path, name: str = "", **arguments: Any) -> None:
    """The files of `FIT`, with one callback or none."""
    task: Node = yaml.safe_load(SMALL_RUN)
    task["trainer"] |= yaml.safe_load(FAST)
    task["model"]["init_args"]["schedule"] = "constant"
    (home / "small.yaml").write_text(yaml.safe_dump(task))
    nodes = [{"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": arguments}] if name else None
    (home / "callback.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": nodes}}))


def fit(home: Path, steps: int, *options: object) -> str:
    """What a fit that works has said on stderr."""
    code, _, err = cli(*FIT, f"--trainer.max_steps={steps}", *options, home=home)
    assert code == 0, err
    return err


def last(home: Path, name: str = "small") -> dict[str, Any]:
    return torch.load(home / f"runs/{name}-lora/version_0/checkpoints/last.ckpt", weights_only=True)


def names(home: Path) -> set[str]:
    folder = home / HOME / "checkpoints"
    return {str(file.relative_to(folder)) for file in folder.rglob("*.ckpt")} - {"last.ckpt"}


# -- the config's settings, the state's counts


STOPS = {"monitor": "val/loss", "mode": "max"}  # the loss falls, so that only the first one is an improvement


@pytest.mark.parametrize("steps", [4, 20])  # stopped by its end, or by the callback after step 6
def test_more_patience_counts_on_from_where_the_run_stood(steps: int, tmp_path: Path) -> None:
    write(tmp_path, "EarlyStopping", **STOPS, patience=2)
    fit(tmp_path, steps)
    assert last(tmp_path)["global_step"] == min(steps, 6)
    content = last(tmp_path)
    assert set(content["callback_settings"]) <= set(content["callbacks"])  # not, say, the text of config.yaml
    write(tmp_path, "EarlyStopping", **STOPS, patience=4)
    said = fit(tmp_path, 20, "--ckpt_path=last")
    assert "trainer.callbacks EarlyStopping.patience 4 (was 2)" in said
    assert last(tmp_path)["global_step"] == 10  # the first validation and four without progress, whatever came between


def test_a_run_that_a_threshold_stopped_goes_on_without_it(tmp_path: Path) -> None:
    write(tmp_path, "EarlyStopping", monitor="val/loss", stopping_threshold=100.0)
    fit(tmp_path, 8)
    assert last(tmp_path)["global_step"] == 2
    write(tmp_path, "EarlyStopping", monitor="val/loss", stopping_threshold=90.0)
    fit(tmp_path, 8, "--ckpt_path=last")
    assert last(tmp_path)["global_step"] == 2
    write(tmp_path, "EarlyStopping", monitor="val/loss")
    fit(tmp_path, 8, "--ckpt_path=last")
    assert last(tmp_path)["global_step"] == 8


@pytest.mark.slow
def test_another_score_begins_anew(tmp_path: Path) -> None:
    write(tmp_path, "EarlyStopping", **STOPS, patience=2)
    fit(tmp_path, 6)
    write(tmp_path, "EarlyStopping", monitor="val/accuracy", mode="min", patience=20)
    assert "EarlyStopping.monitor 'val/accuracy' (was 'val/loss')" in fit(tmp_path, 8, "--ckpt_path=last")
    state = next(each for key, each in last(tmp_path)["callbacks"].items() if key.startswith("EarlyStopping"))
    assert state["wait_count"] <= 1


def test_fewer_and_more_files_are_kept_and_the_best_is_remembered(tmp_path: Path) -> None:
    worst = {"monitor": "val/loss", "mode": "max", "filename": "{step}"}  # step 2, then 4, ...
    write(tmp_path, "ModelCheckpoint", **worst, save_top_k=3)
    fit(tmp_path, 8)
    assert names(tmp_path) == {"step=2.ckpt", "step=4.ckpt", "step=6.ckpt"}
    write(tmp_path, "ModelCheckpoint", **worst, save_top_k=1)
    fit(tmp_path, 10, "--ckpt_path=last")
    state = next(each for key, each in last(tmp_path)["callbacks"].items() if key.startswith("ModelCheckpoint"))
    assert [Path(path).name for path in state["best_k_models"]] == ["step=2.ckpt"]
    write(tmp_path, "ModelCheckpoint", **worst, every_n_train_steps=3, save_top_k=2)
    fit(tmp_path, 12, "--ckpt_path=last")
    best = json.loads((tmp_path / HOME / "summary.json").read_text())["best"]
    assert best["checkpoint"] == f"{HOME}/checkpoints/step=2.ckpt"


def test_last_knows_what_the_users_callback_has_saved_at_the_same_step(tmp_path: Path) -> None:
    write(tmp_path, "ModelCheckpoint", monitor="val/loss", filename="{step}")
    fit(tmp_path, 4)
    assert names(tmp_path) == {"step=4.ckpt"}
    fit(tmp_path, 6, "--ckpt_path=last")
    assert names(tmp_path) == {"step=6.ckpt"}  # that of step 4 was remembered, and is gone


class Counts(Callback):
    """Keeps in its state what it was given: a count, which goes on from there, and a setting."""

    def __init__(self, count: int = 0, every: int = 1) -> None:
        self.count, self._every = count, every

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += self._every

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "every": self._every}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count, self._every = state_dict["count"], state_dict["every"]


def test_a_count_that_began_as_an_argument_is_no_setting(tmp_path: Path) -> None:
    write(tmp_path)
    for steps, every in ((4, 1), (6, 10)):
        (tmp_path / "callback.yaml").write_text(
            yaml.safe_dump(
                {"trainer": {"callbacks": [{"class_path": f"{__name__}.Counts", "init_args": {"every": every}}]}}
            )
        )
        fit(tmp_path, steps, "--ckpt_path=last")
    assert last(tmp_path)["callbacks"]["Counts"] == {"count": 4 + 2 * 10, "every": 10}


# -- files of weights alone


def test_a_run_goes_on_from_a_file_that_can_and_others_are_for_the_rest(tmp_path: Path) -> None:
    write(tmp_path, "ModelCheckpoint", monitor="val/loss", filename="weights", save_weights_only=True, save_last=True)
    fit(tmp_path, 4)
    weights, full = (tmp_path / HOME / f"checkpoints/{name}.ckpt" for name in ("weights", "last"))
    assert (resumes(weights), resumes(full)) == (False, True)
    code, out, err = cli(*FIT, "--ckpt_path", weights, home=tmp_path)
    assert (code, out) == (2, "")
    assert str(weights) in err.splitlines()[-1]
    assert "weights alone" in err.splitlines()[-1]
    tested = [cli("test", *FIT[1:], "--ckpt_path", file, home=tmp_path)[1] for file in (weights, full)]
    assert scores(tested[0]) == scores(tested[1])
    weights.touch()  # the newest
    assert "takes runs/small-lora/version_0/checkpoints/last.ckpt, step 4" in fit(tmp_path, 6, "--ckpt_path=last")


def test_a_last_file_elsewhere_does_not_take_the_place_of_the_runs_own(tmp_path: Path) -> None:
    write(tmp_path, "ModelCheckpoint", dirpath=str(tmp_path / "elsewhere"), save_last=True)
    fit(tmp_path, 4)
    assert last(tmp_path)["global_step"] == 4
    said = fit(tmp_path, 6, f"--ckpt_path={tmp_path / 'elsewhere/last.ckpt'}")
    assert "lies in no run's folder, the run in runs/small-lora/version_1 goes on from it" in said


# -- files in folders


def test_a_slash_in_a_name_makes_a_folder_of_the_same_run(tmp_path: Path) -> None:
    write(tmp_path, "ModelCheckpoint", monitor="val/loss", filename="{epoch}-{val/loss:.4f}")
    fit(tmp_path, 4)
    (file,) = (tmp_path / HOME / "checkpoints").glob("epoch=0-val/loss=*.ckpt")
    assert run_folders(file) == [tmp_path / HOME]
    code, _, err = cli("export", "--ckpt_path", file, "--format=merged", "--output=out", home=tmp_path)
    assert code == 0, err
    assert cli("predict", *FIT[1:], "--ckpt_path", file, home=tmp_path)[0] == 0
    assert (tmp_path / HOME / "predictions.csv").is_file()
    fit(tmp_path, 6, "--ckpt_path", file)
    assert [path.name for path in (tmp_path / "runs/small-lora").iterdir()] == ["version_0"]
    best = json.loads((tmp_path / HOME / "summary.json").read_text())["best"]["checkpoint"]
    assert scores(cli("test", *FIT[1:], "--ckpt_path", best, home=tmp_path)[1])["test/loss"] > 0


def test_a_config_further_up_is_not_the_runs(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert run_folders(tmp_path / "checkpoints/a/b/c.ckpt") == [tmp_path]
    assert run_folders(tmp_path / "deeper/c.ckpt") == [tmp_path]
    assert run_folders(tmp_path / "models/deeper/c.ckpt") == []


def test_a_checkpoint_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    class Saves:
        state_key, dirpath, save_top_k, mode = "saves", str(tmp_path / "new"), 1, "min"

    own = tmp_path / "new/a/x.ckpt"
    own.parent.mkdir(parents=True)
    own.touch()
    (tmp_path / "y.ckpt").touch()
    for path, expected in (("/old/a/x.ckpt", str(own)), ("/old/../y.ckpt", None), (str(tmp_path / "y.ckpt"), None)):
        state = {
            "best_model_path": path,
            "kth_best_model_path": "",
            "last_model_path": "",
            "best_k_models": {path: 1.0},
        }
        checkpoint = {"callbacks": {"saves": {**state, "dirpath": "/old"}}}
        keep_to_own_folders(checkpoint, [Saves()])  # type: ignore[list-item]
        assert checkpoint["callbacks"].get("saves", {}).get("best_model_path") == expected


def test_what_cannot_be_read_is_passed_over_by_newest_and_not_by_resumes(tmp_path: Path) -> None:
    whole, broken, weights = (tmp_path / f"{name}.ckpt" for name in ("whole", "broken", "weights"))
    torch.save(content(4), whole)
    broken.write_bytes(b"")
    torch.save({key: value for key, value in content(9).items() if key != "optimizer_states"}, weights)
    passed: list[Path] = []
    assert newest(filter(resumes, [whole, broken, weights]), passed.append) == (whole, 4)
    assert passed == [broken]


# -- finders


@pytest.mark.parametrize(
    ("name", "arguments", "part", "key"),
    [
        ("LearningRateFinder", {"num_training_steps": 25}, "model", "lr"),
        ("BatchSizeFinder", {"max_trials": 2, "steps_per_trial": 1, "init_val": 8}, "data", "batch_size"),
    ],
)
def test_a_search_is_as_if_its_result_had_been_given(
    name: str, arguments: dict[str, Any], part: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, name, **arguments)
    fit(tmp_path, 4)
    settings = yaml.safe_load((tmp_path / HOME / "config.yaml").read_text())
    found = settings[part]["init_args"][key]
    assert found != yaml.safe_load(SMALL_RUN)[part]["init_args"][key]
    assert settings["trainer"]["callbacks"] is None
    monkeypatch.setattr(Finder, "search", lambda *_: pytest.fail("the same command searches again"))
    said = fit(tmp_path, 6, "--ckpt_path=last")
    assert f"{name}: the run has {part}.{key} {found}" in said
    write(tmp_path)
    fit(tmp_path, 6, "--name=typed", f"--{part}.{key}={found}")
    parts, whole = last(tmp_path)["state_dict"], last(tmp_path, "typed")["state_dict"]
    assert all(torch.equal(parts[each], value) for each, value in whole.items())
    assert {path.name for path in tmp_path.iterdir()} == {"small.yaml", "callback.yaml", "runs"}


def test_a_finder_of_what_is_no_setting(tmp_path: Path) -> None:
    write(tmp_path, "LearningRateFinder", attr_name="rate")
    code, _, err = cli(*FIT, home=tmp_path)
    assert code == 2
    assert "LearningRateFinder is to find model.rate" in err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_several_processes_cannot_search(tmp_path: Path) -> None:
    write(tmp_path, "LearningRateFinder")
    code, _, err = cli(*FIT, "--trainer.devices=2", "--trainer.strategy=ddp", home=tmp_path)
    assert code == 2
    assert "LearningRateFinder searches in one process" in err.splitlines()[-1]
    assert "model.lr" in err.splitlines()[-1]
