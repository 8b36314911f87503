"""Training waits for the device only where it logs, validates or switches, and mixes nothing on it with what is not.

Nor does anything need float64 on it, which Apple's GPUs do not have.

The device is torch's ``meta``, which computes shapes and holds no values: where a value is read, a GPU would have to be
waited for, and here it is seen without one. Autocast does not know this device, so runs are in fp32.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srlora_pl import ImageClassifier, ImageData, LoRA, PiSSA, SRLoRA, TextClassifier, UserError
from srlora_pl.lowrank import Adaptation, Spectrum
from srlora_pl.lowrank.starts.spectrum import spectra
from srlora_pl.reporting import Monitor, Progress, ProgressLines, ResumableCurves, ResumableTensorBoardLogger
from srlora_pl.tasks.scores import SCORES, ScoreOfAll, metrics
from tests.helpers.encoders import BERT, DEBERTA, Data, folder, samples
from tests.helpers.images import SMALL_VIT
from tests.helpers.toys import toy_batches, toy_net, train

aten = torch.ops.aten
DEVICE = torch.device("meta")
# The last step is validated whatever the interval.
STEPS, LOGS, VALIDATIONS, SWITCHES = 22, {10, 20}, {8, 16, 22}, {5, 11, 16}
SRLORA = SRLoRA(rank=4, target_rank=12)
IN_VALIDATION = -1


class Watch(TorchDispatchMode):
    """Sees every operation, and refuses float64 on the device; a value that is read is 0.

    Attributes:
        step: set from outside.
        waits: (step, function) of each read of a value, and of each tensor sent to the device that is no batch: torch
            waits until it is there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.waits: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        reads = func is aten._local_scalar_dense.default
        moves = func in (aten._to_copy.default, aten.copy_.default)
        if reads and tensors[0].is_meta:
            self._note()
            return torch.zeros((), dtype=tensors[0].dtype).item()
        if func is aten._to_copy.default and tensors[0].is_meta and kwargs.get("device", DEVICE) != DEVICE:
            if kwargs.get("dtype") == torch.float64:  # torch converts where the values come from
                raise AssertionError(f"{_caller()} converts to float64 on the device")
            self._note()
            return torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        if func is aten.copy_.default and tensors[1].is_meta and not tensors[0].is_meta:
            self._note()
            return tensors[0].zero_()
        if len({each.device for each in tensors if each.dim()}) > 1 and not moves:
            raise AssertionError(f"{_caller()} mixes devices in {func}")
        result = func(*args, **kwargs)
        results = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if any(each.is_meta and each.dtype == torch.float64 for each in results):
            raise AssertionError(f"{_caller()} asks the device for float64 in {func}")
        if moves and result.is_meta and not tensors[-1].is_meta:
            self._note()
        return result

    def _note(self) -> None:
        if not _caller().endswith(".transfer_batch_to_device"):
            self.waits.append((self.step, _caller()))

    @property
    def steps(self) -> set[int]:
        """The steps that waited, without the first: what is moved once is moved there."""
        return {step for step, _ in self.waits if step not in (0, 1)}


def _caller() -> str:
    """The nearest function of this package, of Lightning's loops or of the tests; none where this file itself waits."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals["__name__"]
        if name.startswith(("srlora_pl.", "lightning.pytorch.", "tests.")) and name != __name__:
            return f"{name}.{frame.f_code.co_name}"
        frame = frame.f_back
    return ""


def to_device(module: nn.Module) -> None:
    """As `module.to` for a GPU: each parameter stays the same object."""
    for tensor in [*module.parameters(), *module.buffers()]:
        other = torch.empty_like(tensor, device=DEVICE)
        if isinstance(tensor, nn.Parameter):
            other = nn.Parameter(other, tensor.requires_grad)
        torch.utils.swap_tensors(tensor, other)


class OnDevice(L.Callback):
    """Takes the model to the device before the first step, and tells the watch the steps."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        trainer.strategy._root_device = model._device = DEVICE
        to_device(model)
        model.evaluation.to(DEVICE)  # metrics move their own state
        self.watch.__enter__()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.watch.step = trainer.global_step + 1

    def on_validation_batch_start(self, *_: Any) -> None:
        self.watch.step = IN_VALIDATION

    def on_validation_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.watch.step = trainer.global_step

    def on_train_epoch_end(self, *_: Any) -> None:
        self.watch.step = 0

    def on_train_end(self, *_: Any) -> None:
        self.watch.step = 0


@pytest.fixture(autouse=True)
def _like_a_gpu(monkeypatch):
    enabled, autocast, tensor = torch.is_autocast_enabled, torch.autocast, torch.tensor
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": kind != "meta" and enabled(kind))
    monkeypatch.setattr(torch, "autocast", lambda kind, **k: nullcontext() if kind == "meta" else autocast(kind, **k))
    # torch.tensor sends values to a GPU, and forgets them for meta
    monkeypatch.setattr(torch, "tensor", lambda *data, device="cpu", **k: tensor(*data, **k).to(device))


def watched(model: Any, data: Any, path: Path, bar: type = Progress, **options: Any) -> Watch:
    """What a run of ``model`` waited for, with the callbacks that the command line gives it."""
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        log_every_n_steps=10,
        val_check_interval=8,
        check_val_every_n_epoch=None,
        logger=ResumableTensorBoardLogger(path / "curves"),
        callbacks=[OnDevice(watch), ResumableCurves(), LearningRateMonitor("step"), Monitor(), bar()],
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.strategy.teardown = lambda: None  # type: ignore[method-assign] # it would fetch the weights
    try:
        trainer.fit(model, datamodule=data)
    finally:
        watch.__exit__(None, None, None)
    assert trainer.global_step == STEPS
    return watch


@pytest.mark.parametrize(("method", "switches"), [(SRLORA, SWITCHES), (LoRA(rank=4), set())], ids=["srlora", "lora"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_images(optimizer, method, switches, tmp_path):
    torch.manual_seed(0)
    mixing: dict[str, Any] = {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1}
    model = ImageClassifier("vit_tiny_patch16_224", 10, method, SMALL_VIT, optimizer=optimizer, lr=0.1, **mixing)
    watch = watched(model, ImageData("digits", batch_size=64, val_fraction=0.1), tmp_path, gradient_clip_val=1.0)
    assert model.adaptation.controller.progress().done == len(switches)
    assert watch.steps == LOGS | VALIDATIONS | switches, watch.waits


def test_lines_instead_of_a_bar(tmp_path, capsys):
    model = ImageClassifier("vit_tiny_patch16_224", 10, LoRA(rank=4), SMALL_VIT)
    watch = watched(model, ImageData("digits", batch_size=64, val_fraction=0.1), tmp_path, ProgressLines)
    assert watch.steps == LOGS | VALIDATIONS, watch.waits
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step ") for line in lines) == len(LOGS)
    assert sum(line.startswith("validation after ") for line in lines) == len(VALIDATIONS - {IN_VALIDATION})


@pytest.mark.parametrize("config", [BERT, DEBERTA], ids=["bert", "deberta"])
def test_texts(config, tmp_path):
    torch.manual_seed(0)
    path, fast = folder(tmp_path / "net", config), config is DEBERTA
    model = TextClassifier(path, 2, SRLORA, {"pretrained": False}, fast_attention=fast, lr=0.1)
    label = torch.arange(48) % 2
    watch = watched(model, Data(samples(48, label), samples(40, label, length=7)), tmp_path)
    if config is BERT:  # transformers asks in each forward pass whether there is any padding
        theirs = [step for step, caller in watch.waits if caller == "srlora_pl.models.encoder_family.logits"]
        assert [step for step in theirs if step > 0] == [*range(1, STEPS + 1)]
        watch.waits = [each for each in watch.waits if each[1] != "srlora_pl.models.encoder_family.logits"]
    assert watch.steps == LOGS | VALIDATIONS | SWITCHES, watch.waits


def test_a_loop_without_lightning():
    net = toy_net(dim=24)
    adaptation = Adaptation(net, SRLORA, ["head"])
    adaptation.start()
    adaptation.plan(STEPS)
    to_device(net)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    batches = [tuple(each.to(DEVICE) for each in batch) for batch in toy_batches(STEPS)]
    with Watch() as watch:
        for step, batch in enumerate(batches):
            watch.step = step + 1
            train(net, adaptation, optimizer, [batch], first_step=step)
    assert watch.steps == SWITCHES, watch.waits


def test_a_start_is_computed_where_a_resumed_run_will_replay_it(tmp_path):
    """Two devices may round differently. What comes back from this one is 0."""
    Adaptation(toy_net(dim=24), SRLORA).start(spectra(cache=tmp_path))
    net = toy_net(dim=24)
    with Watch():
        Adaptation(net, SRLORA).start(spectra(cache=tmp_path), DEVICE)
    for name, weight in net.named_parameters():
        assert not name.endswith("lora_A") or weight.any()
        assert not (name.startswith("blocks.") and name.endswith("weight") and weight.any()), name


def test_the_spectrum_of_a_weight_on_the_device_is_computed_elsewhere():
    """What comes back from this device is 0, and refused as such; the device itself was not asked for float64."""
    with Watch(), pytest.raises(UserError, match="is zero"):
        Spectrum.of(torch.ones(4, 3, device=DEVICE), 2)


def test_a_state_in_double_precision_is_replayed_elsewhere():
    def adapted() -> Adaptation:
        net = toy_net(dtype=torch.float64, dim=24)
        return Adaptation(net, PiSSA(rank=2), pretrained=lambda: toy_net(dtype=torch.float64, dim=24).state_dict())

    one, other = adapted(), adapted()
    one.start()
    one.restorable_parameters()
    with Watch():
        other.load_state_dict(one.state_dict(compact=True), DEVICE)
    for name, layer in one.layers.items():
        assert torch.equal(layer.weight, other.layers[name].weight), name


@pytest.mark.parametrize("problem", SCORES)
def test_scores_need_no_float64_on_the_device(problem):
    logits, label = torch.zeros(6, 3), torch.arange(6) % 3
    preds, target = {
        "single_label": (logits, label),
        "multi_label": (logits.long(), logits),
        "regression": (logits[:, 0], logits[:, 0]),
    }[problem]
    with Watch():
        for name, metric in metrics(problem, tuple(SCORES[problem]), 3).items():
            metric.to(DEVICE).update(preds=preds.to(DEVICE), target=target.to(DEVICE))
            value = metric.compute()
            assert (value.device, value.dtype) == (DEVICE, torch.float32), name
        mean = ScoreOfAll(torch.mean, "value").to(DEVICE)
        mean.update(value=logits[:, 0].to(DEVICE))
        assert (mean.compute().device, mean.compute().dtype) == (DEVICE, torch.float32)
