"""README's code runs, and the files, configs and commands that it names exist."""

import re
from typing import Any

import lightning as L
import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.pages import README, blocks
from tests.helpers.paths import ROOT

TEXT = README.read_text(encoding="utf-8")
RAW = "https://raw.githubusercontent.com/srlora-pl/srlora_pl/main/"
BLOB = "https://github.com/srlora-pl/srlora_pl/blob/main/"


def small(create: Any) -> Any:
    """``timm.create_model`` for a network of a few kilobytes without pretrained weights."""

    def make(name: str, pretrained: bool, num_classes: int) -> Any:
        assert pretrained, "a start on singular directions is shown on pretrained weights"
        return create(name, img_size=32, patch_size=8, depth=2, num_classes=num_classes)

    return make


def test_the_own_model_example_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(timm, "create_model", small(timm.create_model))
    (example,) = [block.text for block in blocks("python", "README.md")]
    names: dict[str, Any] = {"__name__": "readme"}
    exec(example, names)
    model = names["MyModel"]()
    head = model.net.head.weight.detach().clone()
    data = TensorDataset(torch.randn(16, 3, 32, 32), torch.randint(10, (16,)))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, DataLoader(data, batch_size=4))
    assert model.adaptation.controller.progress().done == 1
    assert not torch.equal(model.net.head.weight, head)


def test_it_can_be_read_in_one_sitting():
    assert len(TEXT.splitlines()) <= 150


@pytest.mark.parametrize("path", sorted(set(re.findall(rf"{BLOB}([\w/.-]+)|{RAW}([\w/.-]+)", TEXT))))
def test_its_links_lead_to_files(path):
    assert (ROOT / "".join(path)).is_file()


def test_every_reference_is_defined_and_used():
    defined = set(re.findall(r"^\[([\w ]+)\]: ", TEXT, re.MULTILINE))
    assert defined == set(re.findall(r"\]\[([\w ]+)\]", TEXT))


def test_the_picture_is_shown_from_anywhere():
    (picture,) = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", TEXT)
    assert picture.startswith(RAW)


def test_ci_runs_the_readmes_test_command():
    (command,) = [block.text for block in blocks("bash", "README.md") if "pytest" in block.text]
    test = command.strip().rpartition("&& .venv/bin/")[2]
    assert f"\n{test}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert ".[dev,peft]" in command
