"""PEFT folders of any network, and several of them on one base, through the PEFT library itself."""

import copy
import json

import pytest
import timm
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import srlora_pl.models.peft_folder
from srlora_pl import Adaptation, DoRA, HydraLoRA, LoRA, PiSSA, SRLoRA, UserError, export_model, export_peft
from srlora_pl.lowrank.delta import change
from tests.helpers.errors import mentions
from tests.helpers.models import CLASSES, batch_for, fit, image_task, vit_folder


class Net(nn.Module):
    """Words in, two heads out: no task of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(2)])
        self.norm = nn.BatchNorm1d(8)
        self.scale = nn.Parameter(torch.ones(8))
        self.heads = nn.ModuleDict({"kind": nn.Linear(8, 3), "age": nn.Linear(8, 1)})

    def forward(self, x):
        x = self.words(x).mean(1)
        for block in self.blocks:
            x = x + block(x)
        x = self.norm(x) * self.scale
        return torch.cat([head(x) for head in self.heads.values()], 1)


def pretrained():
    torch.manual_seed(2)
    return Net().eval()


def words(seed):
    return torch.randint(11, (9, 5), generator=torch.Generator().manual_seed(seed))


def trained(method, trainable=("heads.kind", "heads.age"), steps=8, reload=None):
    """An adaptation after a plain loop of a few steps."""
    net = pretrained()
    adaptation = Adaptation(net, method, trainable=trainable, pretrained=reload)
    optimizer = torch.optim.AdamW(adaptation.param_groups(lr=0.05))
    adaptation.attach(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        (net(words(step)) - torch.arange(4.0)).pow(2).mean().backward()
        optimizer.step()
    return adaptation


METHODS = {
    "lora": LoRA(rank=2),
    "pissa": PiSSA(rank=2),
    "srlora": SRLoRA(rank=2, target_rank=6),
    "dora": DoRA(rank=2),
    "one layer in two": LoRA(rank=2, target_modules=[r"blocks\.\d\.0"], rank_pattern={r"1\.0": 3}),
}


@pytest.mark.parametrize("name", METHODS)
def test_any_network_is_exported(tmp_path, name):
    adaptation = trained(METHODS[name])
    report = export_peft(adaptation, tmp_path / "out", "me/words", revision="v2", class_names=["a", "b", "c"])
    assert report.difference < 1e-5
    assert report.files == ["adapter_config.json", "adapter_model.safetensors"]
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("me/words", "v2")
    assert settings["modules_to_save"] == ["heads.kind", "heads.age"]
    net, wanted = pretrained(), adaptation.net.eval()(words(99))
    assert (net(words(99)) - wanted).abs().max() > 0.1
    loaded = PeftModel.from_pretrained(pretrained(), tmp_path / "out")
    torch.testing.assert_close(loaded(words(99)), wanted, atol=1e-5, rtol=0)
    assert "weight difference to the trained model" in "\n".join(report.lines())


def test_the_network_stays_as_it_was(tmp_path):
    adaptation = trained(METHODS["srlora"])
    before = copy.deepcopy(adaptation.net.state_dict())
    trains = {name for name, p in adaptation.net.named_parameters() if p.requires_grad}
    export_peft(adaptation, tmp_path / "out", "base")
    assert all(torch.equal(value, before[name]) for name, value in adaptation.net.state_dict().items())
    assert trains == {name for name, p in adaptation.net.named_parameters() if p.requires_grad}


def test_it_is_compressed_on_demand(tmp_path):
    adaptation = trained(METHODS["srlora"])
    report = export_peft(adaptation, tmp_path / "out", "base", rank=1)
    assert {factors.rank for factors in report.factors.values()} == {1}
    assert report.difference > 1e-3


def test_without_peft_it_is_checked_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("srlora_pl.export.adapters.find_spec", lambda name: None)
    report = export_peft(trained(METHODS["srlora"]), tmp_path / "out", "base")
    assert report.difference < 1e-5
    assert "peft is not installed, so the files were not loaded back" in report.notes


def test_files_of_other_weights_are_not_left(tmp_path, monkeypatch):
    write = srlora_pl.models.peft_folder.write

    def broken(folder, *rest):
        size = write(folder, *rest)
        tensors = load_file(folder / "adapter_model.safetensors")
        key = next(key for key in tensors if "lora_B" in key)
        save_file(tensors | {key: tensors[key] * 1.1}, folder / "adapter_model.safetensors", {"format": "pt"})
        return size

    monkeypatch.setattr(srlora_pl.models.peft_folder, "write", broken)
    with pytest.raises(UserError, match=mentions("differ", "nothing was written")):
        export_peft(trained(METHODS["lora"]), tmp_path / "out", "base")
    assert not list(tmp_path.iterdir())


def test_what_a_folder_cannot_hold_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=mentions("HydraLoRA", "merged")):
        export_peft(trained(HydraLoRA(rank=2)), tmp_path / "out", "base")
    with pytest.raises(UserError, match=mentions("parameter scale", "merged_copy()")):
        export_peft(trained(METHODS["lora"], ("heads", "scale")), tmp_path / "out", "base")
    adaptation = trained(METHODS["lora"], reload=lambda: pretrained().state_dict())
    adaptation.net.norm.running_mean += 1
    with pytest.raises(UserError, match=mentions("norm.running_mean", "pretrained weights")):
        export_peft(adaptation, tmp_path / "out", "base")
    adaptation.net.words.weight.data[0] = float("nan")
    with pytest.raises(UserError, match=mentions("words.weight", "NaN")):
        export_peft(adaptation, tmp_path / "out", "base")
    assert not list(tmp_path.iterdir())


def test_statistics_that_nothing_tells_of_are_mentioned(tmp_path):
    (remark,) = export_peft(trained(METHODS["lora"]), tmp_path / "out", "base").notes[1:]
    assert remark == "the running statistics of norm.running_mean are not in it: they must be those of the base"
    known = trained(METHODS["lora"], reload=lambda: pretrained().state_dict())
    assert len(export_peft(known, tmp_path / "known", "base").notes) == 1


# -- several adapters


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two tasks that trained on one base, their folders, and the base's."""
    home = tmp_path_factory.mktemp("two")
    vit = vit_folder(home / "vit")
    tasks = {name: image_task(vit, SRLoRA(rank=2, target_rank=r)) for name, r in (("first", 4), ("second", 6))}
    for seed, (name, task) in enumerate(tasks.items()):
        fit(task, steps=9 + seed, lr=0.02 * (seed + 1))
        export_model(task, home / name, "peft")
    return tasks, home, lambda: timm.create_model(f"local-dir:{vit}", pretrained=True, num_classes=CLASSES)


def test_two_folders_on_one_base_are_switched_between(two):
    tasks, home, base = two
    model = PeftModel.from_pretrained(base(), home / "first", adapter_name="first")
    model.load_adapter(home / "second", adapter_name="second")
    image = batch_for(tasks["first"], seed=99)["image"]
    wanted = {name: task.net.eval()(image) for name, task in tasks.items()}
    assert (wanted["first"] - wanted["second"]).abs().max() > 0.1
    for name in ("second", "first", "second"):
        model.set_adapter(name)
        torch.testing.assert_close(model(image), wanted[name], atol=1e-5, rtol=0)


def test_two_folders_are_added_with_weights(two, page_code, monkeypatch):
    """With the code of the page."""
    tasks, home, base = two
    monkeypatch.chdir(home)
    names = {"base": base()}
    exec(page_code("add_weighted_adapter"), names)
    changes = {name: change(task.adaptation) for name, task in tasks.items()}
    parts = {"first": 0.7, "second": 0.3}
    net = base()
    with torch.no_grad():
        for layer in changes["first"]:
            for name, part in parts.items():
                factors = changes[name][layer]
                net.get_parameter(f"{layer}.weight").add_(factors.B @ factors.A, alpha=part)
        for key in ("weight", "bias"):
            mixed = sum(part * tasks[name].net.head.get_parameter(key) for name, part in parts.items())
            net.head.get_parameter(key).copy_(mixed)
        image = batch_for(tasks["first"], seed=99)["image"]
        torch.testing.assert_close(names["model"].eval()(image), net.eval()(image), atol=1e-5, rtol=0)


@pytest.fixture
def page_code():
    from tests.helpers.pages import blocks

    def find(word):
        (found,) = [block.text for block in blocks("python", "docs/export.md") if word in block.text]
        return found

    return find
