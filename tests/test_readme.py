"""The README's code runs, and the files and commands that it names exist."""

import re
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from srlora_pl.lowrank.methods import REGISTRY
from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def example(word: str) -> str:
    (found,) = [block for block in blocks("python") if word in block]
    return found


def test_the_own_model_example_trains(tmp_path):
    names: dict[str, Any] = {"__name__": "readme"}
    exec(example("SRLoRAMixin"), names)
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


def test_the_plain_loop_example_trains_and_switches():
    names: dict[str, Any] = {}
    exec(example("adaptation.merge()"), names)
    assert names["adaptation"].controller.progress().done == 1
    assert all(layer.merged for layer in names["adaptation"].layers.values())


def test_the_plain_loop_example_goes_on_as_if_it_had_not_been_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training = example("adaptation.merge()").partition("adaptation.merge()")[0]
    made, loop = training.split("for step in range(1, 21):")
    save, load = example("loop.pt").split("\n\n")

    def run(*parts):
        """The names that ``parts`` leave: code, or the steps of the loop."""
        names: dict[str, Any] = {}
        torch.manual_seed(0)  # of a net that is not pretrained here
        for part in parts:
            steps = f"for step in {part}:\n    torch.manual_seed(step){loop}" if isinstance(part, range) else part
            exec(steps, names)
        return names

    whole = run(made, range(1, 21))
    run(made, range(1, 8), save)
    resumed = run(made.partition("adaptation.attach(")[0], load, range(8, 21))
    assert resumed["adaptation"].controller.progress().done == 1
    for (name, value), other in zip(
        whole["net"].state_dict().items(), resumed["net"].state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


def test_the_loop_example_needs_no_lightning():
    assert "lightning" not in example("adaptation.merge()")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"configs/[\w/]+\.yaml", README))))
def test_configs_named_in_commands_exist(path):
    assert (ROOT / path).is_file()


def test_the_tables_name_every_config():
    named = set(re.findall(r"^\| `(\w+\.yaml)`", README, re.MULTILINE))
    assert named == {file.name for file in (ROOT / "configs").glob("*.yaml")}


def test_a_table_names_every_method_and_overlay():
    rows = [line.split(" | ") for line in README.splitlines() if "`srlora_pl." in line and line.startswith("| `")]
    overlays = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert overlays == {file.stem for file in (ROOT / "configs/methods").glob("*.yaml")}
    methods = {name for row in rows for name in re.findall(r"`srlora_pl\.(\w+)`", row[1])}
    assert methods == {kind.__name__ for kind in REGISTRY}


def test_ci_runs_the_readmes_test_command():
    (command,) = [block for block in blocks("bash") if "pytest" in block]
    test = command.strip().rpartition("&& .venv/bin/")[2]
    assert f"\n{test}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert ".[dev,peft]" in command
