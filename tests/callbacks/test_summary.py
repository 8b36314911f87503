"""summary.json tells how training ended, whatever is loaded for the test after it."""

import json

import lightning as L
import torch
from torch.utils.data import DataLoader

from srlora_pl import ImageClassifier, SRLoRA, system
from srlora_pl.callbacks import Summary
from tests.tasks.conftest import CLASSES, SMALL_VIT, samples


class There(L.Callback):
    """Whether the file is there, at the start of training and after its steps."""

    def __init__(self, path):
        self.path, self.seen = path, []

    def on_train_start(self, *_):
        self.seen.append(self.path.exists())

    def on_train_batch_end(self, *_):
        self.seen.append(self.path.exists())


def test_the_switches_and_the_commit_are_those_of_the_run(tmp_path, monkeypatch):
    torch.manual_seed(0)
    commits = iter(("abc", "of a change while it ran"))
    monkeypatch.setattr(system, "commit", lambda: next(commits))
    model = ImageClassifier("vit_tiny_patch16_224", CLASSES, SRLoRA(rank=2, target_rank=6), SMALL_VIT)
    summary, there = Summary(tmp_path), There(tmp_path / "summary.json")
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
    assert there.seen == [True] + 8 * [False]
    assert model.adaptation.switches_done == 3
    model.adaptation.switches_done = 1  # as an earlier checkpoint would set it
    summary.write(trainer, model, {"test/score": 0.5}, {})
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found["switches"], found["steps"], found["scores"]) == (3, 8, {"test/score": 0.5})
    assert found["commit"] == "abc"
    assert found["seconds"] == summary.seconds > 0
