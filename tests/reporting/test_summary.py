"""summary.json tells how training ended, whatever is loaded for the test after it."""

import json
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from srlora_pl import ImageClassifier, ReLoRA, SRLoRA
from srlora_pl.reporting import Summary
from srlora_pl.util import system
from tests.helpers.images import CLASSES, SMALL_VIT, samples


class There(L.Callback):
    """Whether the file is there, at the start of training and after its steps; stops after ``last``."""

    def __init__(self, path, last):
        self.path, self.last, self.seen = path, last, []

    def on_train_start(self, *_):
        self.seen.append(self.path.exists())

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(self.path.exists())
        trainer.should_stop = trainer.global_step == self.last


def small_model():
    torch.manual_seed(0)
    return ImageClassifier("vit_tiny_patch16_224", CLASSES, SRLoRA(rank=2, target_rank=6), SMALL_VIT)


@pytest.mark.parametrize(("last", "switches"), [(8, 3), (5, 2)])
def test_the_switches_and_the_commit_are_those_of_the_whole_run(last, switches, tmp_path, monkeypatch):
    commits = iter(("abc", "of a change while it ran"))
    monkeypatch.setattr(system, "commit", lambda: next(commits))
    model = small_model()
    summary, there = Summary(tmp_path), There(tmp_path / "summary.json", last)
    there.path.write_text("of an earlier end")
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=8,
        callbacks=[summary, there],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loader = DataLoader(samples(32), batch_size=4)
    trainer.fit(model, loader)
    assert there.seen == [True] + last * [False]
    assert model.adaptation.controller.progress().done == switches
    model.adaptation.controller.switches_done = 1  # as an earlier checkpoint would set it
    summary.write(trainer, model, {"test/score": 0.5}, {})
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found["switches"], found["steps"], found["scores"]) == (switches, last, {"test/score": 0.5})
    assert found["commit"] == "abc"
    assert found["seconds"] == summary.seconds > 0


def test_the_restarts_of_a_method_are_no_switches(tmp_path):
    """SRLoRA's summary has switches alone, ReLoRA's names its restarts beside 0 switches."""
    found = []
    for method in (SRLoRA(rank=2, target_rank=6), ReLoRA(rank=2, restarts=2)):
        model, summary = ImageClassifier("vit_tiny_patch16_224", CLASSES, method, SMALL_VIT), Summary(tmp_path)
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=6,
            callbacks=[summary],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(model, DataLoader(samples(24), batch_size=4))
        summary.write(trainer, model, {}, {})
        content = json.loads((tmp_path / "summary.json").read_text())
        found.append({key: content.get(key) for key in ("switches", "restarts")})
    assert found == [{"switches": 3, "restarts": None}, {"switches": 0, "restarts": 2}]


def test_seconds_add_up_over_the_processes_of_a_run(tmp_path, monkeypatch):
    clock = iter([100.0, 103.0, 104.5, 20.0, 21.0, 27.0])
    monkeypatch.setattr("srlora_pl.reporting.summary.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    first, second, model = Summary(tmp_path), Summary(tmp_path), small_model()
    first.on_fit_start(None, model)
    saved = first.state_dict()  # as a checkpoint in the middle of a run keeps it
    assert saved == {"seconds": 3.0}
    first.on_fit_end(None, model)
    assert first.seconds == 4.5  # the end stops the clock
    second.load_state_dict(saved)
    assert second.seconds == 3.0
    second.on_fit_start(None, model)
    assert second.seconds == 4.0
    second.on_fit_end(None, model)
    assert second.state_dict() == {"seconds": 10.0}
    assert (first.earlier, second.earlier) == (0.0, 3.0)


def test_a_score_that_is_no_number_is_null(tmp_path):
    """A correlation with predictions that are all the same."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    Summary(tmp_path).write(trainer, small_model(), {"test/pearson": float("nan")}, {})
    text = (tmp_path / "summary.json").read_text()
    assert "NaN" not in text
    found = json.loads(text)
    assert (found["scores"], found["not_finite"]) == ({"test/pearson": None}, {"scores.test/pearson": "nan"})
