"""Folders that the PEFT library wrote as a start: the outputs are peft's own, whatever goes on from there."""

import copy
import json
import pickle
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from srlora_pl import ImageClassifier, LoRA, PiSSA, SRLoRA, UserError, export_model
from srlora_pl.lowrank.delta import Factors
from srlora_pl.lowrank.starts.spectrum import spectra
from srlora_pl.models.peft_folder import PeftFolder, write
from tests.helpers.encoders import BERT
from tests.helpers.errors import mentions
from tests.helpers.models import CLASSES, batch_for, encoder_folder, fit, image_task, text_task, vit_folder

VIT_LORA = LoraConfig(
    r=2, lora_alpha=6, target_modules=["qkv", "fc1"], rank_pattern={"fc1": 3}, modules_to_save=["head"]
)
SAME = {"rank": 2, "alpha": 6, "target_modules": ["qkv", "fc1"], "rank_pattern": {"fc1": 3}}


def saved(net, config, folder):
    """``net`` in peft with random pairs, saved to ``folder``; as it is after loading, and the folder's name."""
    adapted = get_peft_model(net, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A ViT, a BERT, and an adapter for each that peft wrote."""
    home = tmp_path_factory.mktemp("home")
    vit_folder(home / "vit")
    encoder_folder(home / "bert", BERT)
    saved(new_vit(home), VIT_LORA, home / "vit-lora")
    bert_lora = LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=6, target_modules=["query", "value"], use_rslora=True)
    saved(new_bert(home), bert_lora, home / "bert-lora")
    return home


def new_vit(home, num_classes=CLASSES):
    return timm.create_model(f"local-dir:{home / 'vit'}", pretrained=True, num_classes=num_classes)


def new_bert(home):
    return AutoModelForSequenceClassification.from_pretrained(home / "bert", num_labels=2)


@torch.no_grad()
def logits(module, batch):
    if isinstance(module, L.LightningModule):
        return module.eval().logits(batch)
    if "image" in batch:
        return module.eval()(batch["image"])
    return module.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def image_start(home, method, adapter="vit-lora", **options):
    return image_task(str(home / "vit"), method, adapter=str(home / adapter), **options)


def text_start(home, method, **options):
    return text_task(str(home / "bert"), method, adapter=str(home / "bert-lora"), **options)


STARTS = {
    "vit, LoRA": partial(image_start, method=LoRA(**SAME)),
    "vit, PiSSA": partial(image_start, method=PiSSA(rank=3, alpha=1.5)),
    "vit, SRLoRA": partial(image_start, method=SRLoRA(rank=2, alpha=5, target_rank=8, target_modules=["fc1", "fc2"])),
    "bert, LoRA": partial(text_start, method=LoRA(rank=3, alpha=6, target_modules=["query", "value"], use_rslora=True)),
    "bert, SRLoRA": partial(text_start, method=SRLoRA(rank=2, alpha=5, target_rank=8)),
}


def with_peft(home, name):
    """The adapter on its base, as peft loads it."""
    if name.startswith("vit"):
        return PeftModel.from_pretrained(new_vit(home), home / "vit-lora")
    torch.manual_seed(7)  # peft saved no pooler of BERT, which is pretrained; the head is in the folder
    return PeftModel.from_pretrained(new_bert(home), home / "bert-lora")


@pytest.mark.parametrize("name", STARTS)
def test_the_start_computes_what_peft_computes(home, name):
    task = STARTS[name](home)
    batch = batch_for(task)
    wanted = logits(with_peft(home, name), batch)
    bare = new_vit(home) if name.startswith("vit") else new_bert(home)
    assert (logits(bare, batch) - wanted).abs().max() > 0.1
    torch.testing.assert_close(logits(task, batch), wanted, atol=1e-6 * float(wanted.abs().max().clamp(1)), rtol=0)
    task.adaptation.start()
    torch.testing.assert_close(logits(task, batch), wanted, atol=1e-5, rtol=0)


def test_an_adapter_in_half_precision_with_a_norm(home, tmp_path):
    adapted = saved(
        new_vit(home), LoraConfig(r=2, lora_alpha=3, target_modules=["qkv"], modules_to_save=["norm"]), tmp_path
    )
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
    adapted = PeftModel.from_pretrained(new_vit(home), tmp_path)
    task = image_task(str(home / "vit"), PiSSA(rank=2), adapter=str(tmp_path))
    batch = batch_for(task)
    torch.manual_seed(7)
    with torch.no_grad():  # this adapter has no head, so each network has a new one
        task.net.head.load_state_dict(adapted.base_model.model.head.state_dict())
    wanted = logits(adapted, batch)
    torch.testing.assert_close(logits(task, batch), wanted, atol=1e-6 * float(wanted.abs().max().clamp(1)), rtol=0)
    report = export_model(fit(task, steps=3), tmp_path / "peft", "peft")
    assert report.difference < 1e-4
    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["head", "norm"]


def test_lora_goes_on_with_the_pairs(home):
    task = image_start(home, LoRA(**SAME))
    tensors = load_file(home / "vit-lora/adapter_model.safetensors")
    for name, layer in task.adaptation.layers.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        for matrix in layer.matrices(name):
            assert torch.equal(matrix.A, A)
        assert torch.equal(layer.lora_B.reshape(B.shape), B)
        assert torch.equal(layer.weight, new_vit(home).get_parameter(f"{name}.weight"))


@pytest.mark.parametrize("method", [PiSSA(rank=2), SRLoRA(rank=2, target_rank=4)])
def test_the_spectrum_is_taken_of_base_and_adapter(home, method):
    task = image_start(home, method)
    pair, name = PeftFolder.read(str(home / "vit-lora")).pairs["blocks.0.mlp.fc1"], "blocks.0.mlp.fc1"
    weight = new_vit(home).get_parameter(f"{name}.weight").detach() + 2 * pair.B @ pair.A
    start = spectra()(task.adaptation)
    task.adaptation.start(lambda adaptation: start)
    matrix = next(matrix for matrix in task.adaptation.matrices if matrix.name == name)
    sigma = torch.linalg.svdvals(weight)[: method.directions(matrix)]
    torch.testing.assert_close(start[name].sigma, sigma, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(task.adaptation.pretrained_weights()[name], weight, atol=1e-6, rtol=0)
    fit(task, steps=3)  # from here on the pretrained weights come from their files
    torch.testing.assert_close(task.adaptation.pretrained_weights()[name], weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("classes", [CLASSES, 3])
def test_the_head_is_taken_over_where_the_classes_agree(home, classes):
    task = image_start(home, LoRA(**SAME), num_classes=classes)
    theirs = load_file(home / "vit-lora/adapter_model.safetensors")["base_model.model.head.weight"]
    assert task.net.head.weight.shape == (classes, 32)
    assert torch.equal(task.net.head.weight, theirs) == (classes == CLASSES)
    assert task.net.head.weight.requires_grad


@pytest.mark.parametrize("name", STARTS)
def test_what_trained_from_an_adapter_is_exported_for_the_same_base(home, tmp_path, name):
    task = fit(STARTS[name](home), steps=7)
    for mode in ("merged", "peft"):
        assert export_model(task, tmp_path / mode, mode).difference < 1e-5 * 10
    base = new_vit(home) if name.startswith("vit") else new_bert(home)
    batch = batch_for(task, seed=99)
    got, wanted = logits(PeftModel.from_pretrained(base, tmp_path / "peft"), batch), logits(task, batch)
    assert (wanted - logits(with_peft(home, name), batch)).abs().max() > 1e-2
    torch.testing.assert_close(got, wanted, atol=1e-5 * float(wanted.abs().max().clamp(1)), rtol=0)


def test_our_own_export_is_a_start(home, tmp_path):
    task = fit(image_task(str(home / "vit"), SRLoRA(rank=2, alpha=5, target_rank=8)), steps=7)
    export_model(task, tmp_path / "peft", "peft")
    again = image_task(str(home / "vit"), PiSSA(rank=1), adapter=str(tmp_path / "peft"))
    batch = batch_for(task)
    torch.testing.assert_close(logits(again, batch), logits(task, batch), atol=1e-5, rtol=0)


class TwoNames(nn.Module):
    """Two layers of which one name, taken for a regular expression, matches the other's."""

    def __init__(self):
        super().__init__()
        self.up = nn.ModuleDict({"0": nn.Linear(6, 5)})
        self.up_0, self.down = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.down(self.up_0(self.up["0"](x)))


def test_a_rank_of_its_own_is_that_of_one_layer_only(tmp_path):
    torch.manual_seed(0)
    net = TwoNames()
    ranks = {"up.0": 3, "up_0": 2, "down": 2}
    sizes = {name: net.get_submodule(name).weight.shape for name in ranks}
    factors = {
        name: Factors(torch.randn(out, ranks[name]), torch.randn(ranks[name], in_), 1.0)
        for name, (out, in_) in sizes.items()
    }
    write(tmp_path, factors, {}, ("nowhere", None), None)
    assert {name: pair.rank for name, pair in PeftFolder.read(str(tmp_path)).pairs.items()} == ranks
    with_peft = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)
    for name, pair in factors.items():
        net.get_submodule(name).weight.data += pair.B @ pair.A
    x = torch.randn(7, 6)
    torch.testing.assert_close(with_peft(x), net(x), atol=1e-5, rtol=1e-5)


class Batches(torch.utils.data.Dataset):
    def __init__(self, task):
        self.batch = batch_for(task, 16) | {"index": torch.arange(16)}

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return {key: value[i] for key, value in self.batch.items()}


@pytest.mark.parametrize("name", ["vit, LoRA", "vit, SRLoRA"])
def test_a_checkpoint_of_a_start_is_small_and_loads_again(home, tmp_path, name):
    task = STARTS[name](home)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=6, default_root_dir=tmp_path, **quiet)
    trainer.fit(task, DataLoader(Batches(task), batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    held = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert "net.blocks.0.norm1.weight" not in held
    again = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt")
    for key, value in task.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    if "SRLoRA" in name:
        with pytest.raises(UserError, match=mentions("other pretrained weights")):
            ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt", adapter=None)


# -- disagreements


@pytest.mark.parametrize(
    "changed",
    [
        {"rank": 4},
        {"alpha": 2},
        {"rank_pattern": {"fc1": 4}},
        {"target_modules": ["qkv"], "rank_pattern": {}},
        {"target_modules": ["qkv", "fc1", "fc2"]},
        {"target_modules": ["query", "value", "fc1"]},
        {"use_rslora": True},
    ],
)
def test_a_lora_that_differs_is_told_what_to_set(home, changed):
    with pytest.raises(UserError) as error:
        image_start(home, LoRA(**SAME | changed))
    sentence = str(error.value)
    assert "and model.method differ at blocks." in sentence
    assert "set model.method.rank 2, alpha 6, use_rslora False, target_modules" in sentence
    assert "rank_pattern {'fc1': 3}" in sentence
    assert "or take PiSSA or SRLoRA" in sentence
    assert "\n" not in sentence


# -- what is no plain LoRA


def copied(home, tmp_path, config=(), tensors=(), drop=(), adapter="vit-lora"):
    """A copy of an adapter with other settings and tensors."""
    target = tmp_path / "adapter"
    target.mkdir()
    settings = json.loads((home / adapter / "adapter_config.json").read_text()) | dict(config)
    state = load_file(home / adapter / "adapter_model.safetensors") | dict(tensors)
    for key in drop:
        del state[key]
    (target / "adapter_config.json").write_text(json.dumps(settings))
    save_file(state, target / "adapter_model.safetensors")
    return str(target)


QKV = "base_model.model.blocks.0.attn.qkv.lora_"
FOREIGN = {
    "ia3": ({"config": {"peft_type": "IA3"}}, ["IA3", "LORA"]),
    "dora": ({"config": {"use_dora": True}}, ["use_dora", "True"]),
    "biases": ({"config": {"bias": "lora_only"}}, ["bias", "'lora_only'"]),
    "lora_bias": ({"config": {"lora_bias": True}}, ["lora_bias", "True"]),
    "a setting of the future": ({"config": {"use_magic": 1}}, ["use_magic", "1"]),
    **{
        start: ({"config": {"init_lora_weights": start}}, ["init_lora_weights", f"'{start}'"])
        for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
    },
    "no rank": ({"config": {"r": None}}, ["r and lora_alpha"]),
    "alpha in words": ({"config": {"lora_alpha": "8"}}, ["r and lora_alpha"]),
    "pattern in words": ({"config": {"rank_pattern": {"fc1": "3"}}}, ["'3'", "rank_pattern"]),
    "pattern of zero": ({"config": {"alpha_pattern": {"fc1": 0}}}, ["0", "alpha_pattern"]),
    "broken pattern": ({"config": {"rank_pattern": {"(": 3}}}, ["rank_pattern", "broken"]),
    "patterns in a list": ({"config": {"rank_pattern": ["fc1"]}}, ["rank_pattern", "broken"]),
    "another rank": ({"config": {"r": 4}}, ["blocks.0.attn.qkv", "adapter_config.json", "rank 4"]),
    "no B": ({"drop": [f"{QKV}B.weight"]}, ["(2, 32)", "blocks.0.attn.qkv"]),
    "no A": ({"drop": [f"{QKV}A.weight"]}, ["'blocks.0.attn.qkv.lora_B.weight'", "LoRA"]),
    "a convolution": ({"tensors": {f"{QKV}A.weight": torch.ones(2, 3, 1, 1)}}, ["(2, 3, 1, 1)"]),
    "an embedding": ({"tensors": {"base_model.model.x.lora_embedding_A": torch.ones(1)}}, ["'x.lora_embedding_A'"]),
    "a magnitude": ({"tensors": {f"{QKV}magnitude_vector": torch.ones(96)}}, ["lora_magnitude_vector"]),
    "another prefix": ({"tensors": {"model.x": torch.ones(1)}}, ["'model.x'", "PEFT"]),
    "nan": (
        {"tensors": {f"{QKV}A.weight": torch.full((2, 32), torch.nan)}},
        ["NaN", "base_model.model.blocks.0.attn.qkv.lora_A.weight"],
    ),
    "an unknown layer": (
        {
            "tensors": {
                "base_model.model.blocks.7.q.lora_A.weight": torch.ones(2, 3),
                "base_model.model.blocks.7.q.lora_B.weight": torch.ones(3, 2),
            }
        },
        ["blocks.7.q"],
    ),
    "another width": (
        {"tensors": {f"{QKV}A.weight": torch.ones(2, 31)}},
        ["blocks.0.attn.qkv", "(96, 32)"],
    ),
    "an unknown module": (
        {"tensors": {"base_model.model.neck.weight": torch.ones(1)}},
        ["neck.weight"],
    ),
    "another shape": (
        {"tensors": {"base_model.model.norm.weight": torch.ones(1)}},
        ["norm.weight", "(32,)"],
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_no_plain_lora_for_this_model_is_refused_by_name(home, tmp_path, case):
    changes, words = FOREIGN[case]
    with pytest.raises(UserError, match=mentions(*words)) as error:
        image_task(str(home / "vit"), PiSSA(rank=1), adapter=copied(home, tmp_path, **changes))
    assert "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil"),)


def test_files_that_are_missing_or_run_code_are_refused(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(*words):
        with pytest.raises(UserError, match=mentions(*words)):
            PeftFolder.read("adapter")

    refused("model.adapter", "adapter", "folder")
    adapter = Path(copied(home, tmp_path))
    (adapter / "adapter_model.safetensors").rename(tmp_path / "aside")
    refused("no adapter_model.safetensors")
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    refused("adapter_model.bin", "pickle", "safe_serialization=True")
    (adapter / "adapter_model.safetensors").write_bytes(pickle.dumps(Evil()))
    refused("adapter_model.safetensors", "damaged")
    (adapter / "adapter_model.safetensors").write_bytes((tmp_path / "aside").read_bytes()[:900])
    refused("adapter_model.safetensors", "damaged")
    save_file({}, adapter / "adapter_model.safetensors")
    refused("no LoRA weights")
    for content, sentence in {"[1]": "no settings", "{": "JSON"}.items():
        (adapter / "adapter_config.json").write_text(content)
        refused(sentence)
    (adapter / "adapter_config.json").unlink()
    refused("no adapter_config.json")
    assert not Path("evil").exists()


def test_a_change_of_nothing_is_not_written(tmp_path) -> None:
    """AdaLoRA's before its first step."""
    with pytest.raises(UserError, match=mentions("no pair acts", "--format merged")):
        write(tmp_path, {}, {}, ("base", None), None)
