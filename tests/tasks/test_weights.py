"""``model.weights``: what it casts, and that it changes nothing else."""

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from srlora_pl import DoRA, Full, LoRA, SRLoRA, UserError
from srlora_pl.export.command import export_model
from srlora_pl.lowrank import kernels
from srlora_pl.tasks.base import Task
from tests.helpers.encoders import BERT, DEBERTA
from tests.helpers.errors import mentions
from tests.helpers.models import batch_for, encoder_folder, image_task, text_task, vit_folder

STEPS = 8
BACKBONES = {"vit": vit_folder, **{kind["model_type"]: kind for kind in (BERT, DEBERTA)}}
METHODS = {"lora": LoRA(4), "dora": DoRA(4), "srlora": SRLoRA(4, target_rank=12)}


@pytest.fixture(params=BACKBONES)
def make(request, tmp_path):
    """Makes a task on one of the networks."""
    kind = BACKBONES[request.param]
    folder = vit_folder(tmp_path / "net") if request.param == "vit" else encoder_folder(tmp_path / "net", kind)
    return lambda method, **options: (image_task if request.param == "vit" else text_task)(folder, method, **options)


@pytest.fixture
def one_kernel(monkeypatch):
    """The choice between two equal sums depends on the weight's type."""
    monkeypatch.setattr(kernels, "merging_pays", lambda *_: False)


def rounded(task: Task, file: Any) -> str:
    """The backbone's weights, those of its linears as bfloat16 keeps them."""
    net, heads = task.family.build()[0], task.family.heads(task.net)
    linears = {f"{n}.weight" for n, m in net.named_modules() if type(m) is nn.Linear and not n.startswith(heads)}
    state = {
        name: value for name, value in net.state_dict().items() if not name.startswith(("head", "classifier", "pooler"))
    }
    save_file({n: v.bfloat16().float() if n in linears else v.contiguous() for n, v in state.items()}, file)
    return str(file)


class Stop(Callback):
    """At the end of the first epoch."""

    def on_train_batch_end(self, trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == STEPS


def batches(task: Task) -> DataLoader:
    return DataLoader([batch_for(task, seed=seed) for seed in range(STEPS)], batch_size=None)  # type: ignore[arg-type]


def test_the_matrices_of_linears_are_cast_and_nothing_that_trains(make):
    task = make(LoRA(4, target_modules=r".*(query|qkv|query_proj)"), weights="bfloat16")
    cast = {name for name, parameter in task.net.named_parameters() if parameter.dtype == torch.bfloat16}
    linears = {name for name, module in task.net.named_modules() if isinstance(module, nn.Linear)}
    linears |= {*task.adaptation.layers}
    assert cast == {f"{name}.weight" for name in linears if not name.startswith(task.family.heads(task.net))}
    assert {p.dtype for p in task.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("method", ["lora", "dora"])  # of moved weights autocast rounds ties another way
def test_under_autocast_it_is_the_run_in_float32_from_rounded_weights(make, trainer, one_kernel, tmp_path, method):
    ours = make(METHODS[method], weights="bfloat16")
    theirs = make(METHODS[method], backbone_checkpoint=rounded(make(LoRA(4)), tmp_path / "rounded.safetensors"))
    for task in (ours, theirs):
        trainer(max_steps=STEPS, precision="bf16-mixed").fit(task, batches(task))
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert not parameter.requires_grad or torch.equal(parameter, other), name
    for matrix, other in zip(ours.adaptation.matrices, theirs.adaptation.matrices, strict=True):
        assert torch.equal(matrix.weight, other.weight), matrix.name


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_the_whole_one_to_the_bit(make, trainer, tmp_path, method):
    whole, first, second = (make(METHODS[method], weights="bfloat16") for _ in range(3))
    options, file = {"max_steps": 2 * STEPS, "precision": "bf16-mixed"}, tmp_path / "half.ckpt"
    trainer(**options).fit(whole, batches(whole))
    half = trainer(**options, callbacks=[Stop()])
    half.fit(first, batches(first))
    half.save_checkpoint(file)
    kept = torch.load(file, weights_only=True)["state_dict"]
    assert {value.dtype for value in kept.values()} == {torch.float32}  # neither halves nor what never changes
    trainer(**options).fit(second, batches(second), ckpt_path=file)
    for (name, value), other in zip(second.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("method", METHODS)
def test_exported_weights_are_the_exact_ones(make, trainer, tmp_path, method):
    task = make(METHODS[method], weights="bfloat16")
    trainer(max_steps=STEPS, precision="bf16-mixed").fit(task, batches(task))
    report = export_model(task, tmp_path / "merged")
    assert report.difference <= 1e-6 * report.largest
    loaded = task.family.load(tmp_path / "merged")
    for name, layer in task.adaptation.layers.items():
        assert torch.equal(loaded.get_parameter(f"{name}.weight"), layer.merged_weight()), name
    report = export_model(task, tmp_path / "peft", "peft")
    assert report.difference <= 1e-5 * report.largest


def test_a_method_that_trains_the_weights_is_refused(make):
    with pytest.raises(UserError, match=mentions("Full", "torch.bfloat16", "model.weights")):
        make(Full(), weights="bfloat16")


def test_without_autocast_it_is_refused(make, trainer):
    task = make(LoRA(4), weights="bfloat16")
    with pytest.raises(UserError, match=mentions("model.weights", "trainer.precision '32-true'", "bf16-mixed")):
        trainer().fit(task, batches(task))
