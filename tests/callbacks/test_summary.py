"""summary.json tells how training ended, whatever is loaded for the test after it."""

import json

import lightning as L
import torch
from torch.utils.data import DataLoader

from srlora_pl import ImageClassifier, SRLoRA
from srlora_pl.callbacks import Summary
from tests.tasks.conftest import CLASSES, SMALL_VIT, samples


def test_the_switches_are_those_of_the_whole_run(tmp_path):
    torch.manual_seed(0)
    model = ImageClassifier("vit_tiny_patch16_224", CLASSES, SRLoRA(rank=2, target_rank=6), SMALL_VIT)
    summary = Summary(tmp_path)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=8,
        callbacks=[summary],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loader = DataLoader(samples(32), batch_size=4)
    trainer.fit(model, loader)
    assert model.adaptation.switches_done == 3
    model.adaptation.switches_done = 1  # as an earlier checkpoint would set it
    summary.write(trainer, model, {"test/score": 0.5}, {})
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found["switches"], found["steps"], found["scores"]) == (3, 8, {"test/score": 0.5})
    assert found["seconds"] == summary.seconds > 0
