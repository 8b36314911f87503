"""Every callback that Lightning has, in a run from its first step over a resume to its test; or refused by name."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
import pytest
import torch
import yaml

from tests.helpers.cli import LORA, SMALL_RUN, cli, scores

# What each needs to be made, and words of its refusal. A new one of Lightning's fails until it is thought of.
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "BackboneFinetuning": ({}, ["BackboneFinetuning", "model.method.target_modules"]),
    "BaseFinetuning": ({}, ["BaseFinetuning", "subclass"]),
    "GradientAccumulationScheduler": ({"scheduling": {0: 2}}, ["GradientAccumulationScheduler", "trainer.acc"]),
    "ModelPruning": ({"pruning_fn": "l1_unstructured"}, ["ModelPruning", "export --format merged"]),
    "OnExceptionCheckpoint": ({"dirpath": "."}, ["OnExceptionCheckpoint", "save_on_exception"]),
    "SpikeDetection": ({}, ["SpikeDetection", "EarlyStopping"]),
    "StochasticWeightAveraging": ({"swa_lrs": 0.1, "swa_epoch_start": 1}, ["StochasticWeight", "WeightAveraging"]),
}
WITH_STATE: dict[str, dict[str, Any]] = {
    "BatchSizeFinder": {"max_trials": 2, "steps_per_trial": 1},
    "EarlyStopping": {"monitor": "val/loss"},
    "EMAWeightAveraging": {"decay": 0.5},
    "LearningRateFinder": {"num_training_steps": 25},
    "ModelCheckpoint": {"monitor": "val/accuracy", "mode": "max"},
    "Timer": {"duration": "00:01:00:00"},
    "WeightAveraging": {},
}
WITHOUT_STATE: dict[str, dict[str, Any]] = {
    "BasePredictionWriter": {},
    "Callback": {},
    "Checkpoint": {},
    "DeviceStatsMonitor": {"cpu_stats": True},
    "LambdaCallback": {},
    "LearningRateMonitor": {},
    "ModelSummary": {},
    "ProgressBar": {},
    "RichModelSummary": {},
    "RichProgressBar": {},
    "ThroughputMonitor": {"batch_size_fn": "builtins.len"},
    "TQDMProgressBar": {},
}
RUN = [*("fit", "--config", "small.yaml", "--config", LORA, "--config", "callback.yaml")]
RUN += ["--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1", "--trainer.val_check_interval=2"]
RUN += ["--model.schedule=constant", "--trainer.check_val_every_n_epoch=null"]


def write(home: Path, name: str, arguments: dict[str, Any]) -> None:
    (home / "small.yaml").write_text(SMALL_RUN)
    node = {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": arguments}
    (home / "callback.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [node]}}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_every_callback_is_thought_of() -> None:
    assert {*REFUSED, *WITH_STATE, *WITHOUT_STATE} == set(lightning.pytorch.callbacks.__all__)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    arguments, words = REFUSED[name]
    write(tmp_path, name, arguments)
    code, _, err = cli(*RUN, "--trainer.max_epochs=2", home=tmp_path)
    assert code == 2
    last = err.splitlines()[-1]
    for word in words:
        assert word in last
    assert not [*tmp_path.glob("runs/*")]


QUICK = {"ModelCheckpoint", "EarlyStopping", "EMAWeightAveraging"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in (*WITH_STATE, *WITHOUT_STATE)],
)
def test_from_fit_over_resume_to_test(name: str, tmp_path: Path) -> None:
    write(tmp_path, name, {**WITH_STATE, **WITHOUT_STATE}[name])
    folder = tmp_path / "runs/small-lora/version_0"
    code, out, err = cli(*RUN, "--trainer.max_steps=4", home=tmp_path)
    assert code == 0, err
    chosen = json.loads((folder / "summary.json").read_text())["best"]["checkpoint"]
    tested = cli("test", "--config", folder / "config.yaml", "--ckpt_path", chosen, home=tmp_path)
    assert scores(tested[1]) == scores(out), tested[2]
    assert len(scores(out)) == 4

    code, _, err = cli(*RUN, "--trainer.max_steps=6", "--ckpt_path=last", home=tmp_path)
    assert code == 0, err
    assert cli(*RUN, "--trainer.max_steps=6", "--name=whole", home=tmp_path)[0] == 0
    whole, parts = weights(tmp_path / "runs/whole-lora/version_0"), weights(folder)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
