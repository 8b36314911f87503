"""``model.weights: nf4``: what is in four bits, and that training, files and exports do without the rest."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from srlora_pl import CausalLM, DoRA, Full, ImageClassifier, LoRA, PrefixTuning, PromptTuning, SRLoRA, UserError
from srlora_pl.export.command import export_model
from srlora_pl.lowrank import nf4
from srlora_pl.lowrank.nf4 import NF4, plain
from srlora_pl.tasks.base import Task
from srlora_pl.training.sharding import require_splittable
from srlora_pl.util import program
from tests.helpers.causal import save_llama
from tests.helpers.encoders import BERT
from tests.helpers.errors import mentions
from tests.helpers.models import batch_for, encoder_folder, image_task, text_task, vit_folder

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 4
LINEARS = {  # of a block
    "image": "attn.qkv attn.proj mlp.fc1 mlp.fc2",
    "text": "attention.self.query attention.self.key attention.self.value attention.output.dense "
    "intermediate.dense output.dense",
    "causal": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj "
    "mlp.down_proj",
}


class Kind:
    """A small pretrained network of one of the tasks."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        if name == "image":
            self.folder = vit_folder(folder)
        else:
            self.folder = encoder_folder(folder, BERT) if name == "text" else save_llama(folder)

    def task(self, method: Any = None, **options: Any) -> Task:
        method, options = method or LoRA(4), {"weights": "nf4", **options}
        if self.name == "causal":
            torch.manual_seed(7)
            return CausalLM(self.folder, method, samples=0, **options)
        return (image_task if self.name == "image" else text_task)(self.folder, method, **options)

    def batches(self, task: Task) -> DataLoader:
        if self.name != "causal":
            batches = [batch_for(task, seed=seed) for seed in range(STEPS)]
        else:
            rows = torch.randint(5, 20, (STEPS, 3, 9), generator=torch.Generator().manual_seed(0))
            batches = [{"input_ids": ids, "labels": ids} for ids in rows]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    @property
    def precision(self) -> str:
        return "bf16-mixed" if self.name == "causal" else "32-true"


@pytest.fixture(params=LINEARS, scope="module")
def kind(request, tmp_path_factory) -> Kind:
    return Kind(request.param, tmp_path_factory.mktemp(request.param) / "net")


class Stop(Callback):
    """Halfway."""

    def on_train_batch_end(self, trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == STEPS


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for (name, value), other in zip(ours.items(), theirs.values(), strict=True):
        assert type(value) is type(other), name
        pairs = [(value.packed, other.packed), (value.scales, other.scales)] if type(value) is NF4 else [(value, other)]
        assert all(torch.equal(*pair) for pair in pairs), name


def test_the_linears_of_the_blocks_are_in_four_bits_and_nothing_else(kind):
    task = kind.task(LoRA(4, target_modules=r".*(query|qkv|q_proj)"))  # so that most linears have no pairs
    inside = {name for name, parameter in task.net.named_parameters() if isinstance(parameter, NF4)}
    ends = LINEARS[kind.name].split()
    assert len(inside) == 2 * len(ends)
    assert all(name.removesuffix(".weight").endswith(tuple(ends)) for name in inside)
    others = {p.dtype for n, p in task.net.named_parameters() if n not in inside and not p.requires_grad}
    assert others == {torch.bfloat16 if kind.name == "causal" else torch.float32}
    assert {p.dtype for p in task.parameters() if p.requires_grad} == {torch.float32}


def test_a_resumed_run_equals_the_whole_one_to_the_bit(kind, trainer, tmp_path):
    whole, first, second = (kind.task() for _ in range(3))
    options, file = {"max_steps": 2 * STEPS, "precision": kind.precision}, tmp_path / "half.ckpt"
    trainer(**options).fit(whole, kind.batches(whole))
    half = trainer(**options, callbacks=[Stop()])
    half.fit(first, kind.batches(first))
    half.save_checkpoint(file)
    kept = torch.load(file, weights_only=True)["state_dict"]
    assert {type(value) for value in kept.values()} == {Tensor}
    assert sum(value.numel() for value in kept.values()) == sum(
        p.numel() for p in first.parameters() if p.requires_grad
    )
    trainer(**options).fit(second, kind.batches(second), ckpt_path=file)
    same(second.state_dict(), whole.state_dict())


@pytest.mark.parametrize(("name", "method"), [("text", PromptTuning(3)), ("causal", PrefixTuning(3))], ids=type)
def test_prompts_and_prefixes_train(name, method, trainer, tmp_path):
    kind = Kind(name, tmp_path / "net")
    task = kind.task(method)
    before = {name: parameter.detach().clone() for name, parameter in task.named_parameters()}
    trainer(max_steps=STEPS, precision=kind.precision).fit(task, kind.batches(task))
    for name, parameter in task.named_parameters():
        assert torch.equal(plain(parameter), plain(before[name])) != parameter.requires_grad, name


def test_a_whole_checkpoint_holds_the_four_bits(trainer, tmp_path):
    kind = Kind("image", tmp_path / "net")
    whole, first, second = (kind.task(backbone_kwargs={"pretrained": False}) for _ in range(3))
    trainer(max_steps=2 * STEPS).fit(whole, kind.batches(whole))
    half = trainer(max_steps=2 * STEPS, callbacks=[Stop()])
    half.fit(first, kind.batches(first))
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer(max_steps=2 * STEPS).fit(second, kind.batches(second), ckpt_path=tmp_path / "half.ckpt")
    same(second.state_dict(), whole.state_dict())
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "half.ckpt", "cpu", weights_only=True)
    same(loaded.state_dict(), first.state_dict())


def test_in_double_precision_it_computes_with_the_same_values(trainer, tmp_path):
    kind = Kind("image", tmp_path / "net")
    single, double = kind.task(), kind.task()
    trainer(max_steps=STEPS).fit(single, kind.batches(single))
    trainer(max_steps=STEPS, precision="64-true").fit(double, kind.batches(double))
    weights = [p for p in double.net.parameters() if isinstance(p, NF4)]
    assert {p.dtype for p in weights} == {torch.float64}
    for ours, theirs in zip(single.parameters(), double.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", [LoRA(4), DoRA(4)], ids=["lora", "dora"])
def test_merged_export_adds_to_the_values_and_says_how_far_they_are(kind, method, trainer, tmp_path):
    task = kind.task(method)
    trainer(max_steps=STEPS, precision=kind.precision).fit(task, kind.batches(task))
    report = export_model(task, tmp_path / "merged")
    assert report.difference <= (2e-2 if kind.name == "causal" else 1e-5) * report.largest
    said = next(line for line in report.lines() if "four bits" in line)
    base, lost, size = dict(task.family.build()[0].named_parameters()), 0.0, 0.0
    written = load_file(tmp_path / "merged/model.safetensors")
    for name, layer in task.adaptation.layers.items():
        weight = base[f"{name}.weight"].double()
        W0 = task.adaptation.pretrained_weights()[name]
        lost, size = lost + float((W0 - weight).square().sum()), size + float(weight.square().sum())
        exact = layer.merged_weight()
        stored = next(value for key, value in written.items() if key.endswith(f"{name}.weight"))
        assert torch.equal(stored, exact.to(stored.dtype)), name
    assert f"{(lost / size) ** 0.5:.1e}" in said
    assert 0.05 < (lost / size) ** 0.5 < 0.15


def test_a_peft_folder_belongs_on_the_pretrained_weights_and_says_so(kind, trainer, tmp_path):
    pytest.importorskip("peft")
    task = kind.task(LoRA(4, target_modules=r".*(query|qkv|q_proj)"))
    trainer(max_steps=STEPS, precision=kind.precision).fit(task, kind.batches(task))
    report = export_model(task, tmp_path / "peft", "peft")
    said = report.lines()
    assert any("it belongs on" in line for line in said)
    assert any("four bits" in line for line in said)
    assert 0 < report.difference < report.largest  # of the base's rounding


def test_methods_that_change_weights_are_refused(kind):
    for method in (SRLoRA(4, target_rank=8), Full()):
        with pytest.raises(UserError, match=mentions(type(method).__name__, "four bits", "bfloat16", "LoRA")):
            kind.task(method)


def test_fsdp2_is_refused(tmp_path):
    adaptation = Kind("image", tmp_path / "net").task().adaptation
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(precision="32-true"), callbacks=[])
    with pytest.raises(UserError, match=mentions("model.weights is nf4", "fsdp2", "ddp")):
        require_splittable(trainer, adaptation)


def test_averaged_weights_leave_the_four_bits_alone(trainer, tmp_path):
    kind = Kind("image", tmp_path / "net")
    usual, averaged = kind.task(), kind.task()
    trainer(max_steps=STEPS).fit(usual, kind.batches(usual))
    average = EMAWeightAveraging(decay=0.5)
    trainer(max_steps=STEPS, callbacks=[average]).fit(averaged, kind.batches(averaged))
    before = {name: p for name, p in usual.net.named_parameters() if isinstance(p, NF4)}
    same({n: p for n, p in averaged.net.named_parameters() if isinstance(p, NF4)}, before)
    assert any(not torch.equal(p, q) for p, q in zip(averaged.parameters(), usual.parameters(), strict=True))


def test_a_network_without_linears_in_blocks_is_refused():
    options: dict[str, Any] = {"backbone_kwargs": {"pretrained": False, "layers": (1, 1, 1, 1), "channels": (8,) * 4}}
    with pytest.raises(UserError, match=mentions("model.weights is 'nf4'", "no linear layers", "bfloat16")):
        ImageClassifier("resnet18", 2, LoRA(2), weights="nf4", **options)


def test_without_the_library_one_sentence_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    nf4._ops.cache_clear()
    with pytest.raises(UserError, match=mentions("model.weights nf4", "bitsandbytes", "srlora_pl[nf4]")):
        Kind("image", tmp_path / "net").task()
