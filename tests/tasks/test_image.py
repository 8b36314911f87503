import math
import pickle
import re
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch import Tensor, nn
from torch.utils.data import DataLoader

from srlora_pl import Full, GaLore, ImageClassifier, LoRA, LoRAPro, PiSSA, ReLoRA, SRLoRA
from srlora_pl.lowrank.methods import from_spec
from srlora_pl.models.timm_models import build_backbone
from srlora_pl.util.errors import UserError
from tests.helpers.errors import mentions
from tests.helpers.images import CLASSES, SMALL_VIT, samples


class Record(Callback):
    """Keeps what ``look(trainer, module)`` returns at the start of every micro-batch."""

    def __init__(self, look) -> None:
        self.look, self.seen = look, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen.append(self.look(trainer, pl_module))


# What trains


def test_vit_base_has_the_papers_number_of_adapter_parameters():
    model = ImageClassifier("vit_base_patch16_224", 100, LoRA(rank=8), {"pretrained": False})
    adapters = list(model.adaptation.layers.values())
    assert sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in adapters) == 1_327_104
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 1_327_104 + 768 * 100 + 100


def test_a_model_may_be_pickled_whole():
    model = ImageClassifier("vit_tiny_in64", 10, SRLoRA(rank=4, target_rank=8)).eval()
    again = pickle.loads(pickle.dumps(model))
    image = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(image), model(image))
    again.adaptation.start()
    torch.testing.assert_close(again(image), model(image), rtol=0, atol=1e-5)


def test_head_and_adapters_train_and_nothing_else_moves(classifier, trainer, loader):
    model = classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer().fit(model, loader)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    expected = {n for n, p in model.named_parameters() if ".lora_" in n or n.startswith("net.head.")}
    assert moved == expected == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(expected) == 2 * 2 * 4 + 2  # two blocks, four linears each, two factors; the head


def test_the_backbone_is_in_training_mode_while_it_trains(classifier, trainer, loader):
    model = classifier(backbone_kwargs=SMALL_VIT | {"proj_drop_rate": 0.5})
    seen: list[bool] = []
    model.net.blocks[1].mlp.drop1.register_forward_hook(
        lambda drop, args, output: seen.append(drop.training and bool((output == 0).any()))
    )
    trainer(num_sanity_val_steps=2, max_steps=2).fit(model, loader, loader)
    assert seen[:2] == [False, False]  # the validation before training
    assert seen[2:4] == [True, True]


# The optimizer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_learning_rate_follows_the_schedule_per_optimizer_step(classifier, trainer, loader, accumulate):
    model = classifier(schedule="cosine", warmup_steps=2, lr=0.1, head_lr=0.5, weight_decay=0.01)
    record = Record(lambda t, m: [group["lr"] for group in t.optimizers[0].param_groups])
    trainer(max_steps=6, accumulate_grad_batches=accumulate, callbacks=[record]).fit(model, loader)
    factors = [0, 0.5, *(0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4))]
    rates = record.seen[::accumulate]
    assert [rate[0] for rate in rates] == pytest.approx([0.1 * factor for factor in factors])
    assert [rate[-1] for rate in rates] == pytest.approx([0.5 * factor for factor in factors])


def test_a_method_may_change_the_learning_rate(classifier, trainer, loader):
    model = classifier(schedule="constant", warmup_steps=2, method=ReLoRA(rank=2, restarts=1))
    record = Record(lambda t, m: t.optimizers[0].param_groups[0]["lr"])
    trainer(max_steps=44, max_epochs=-1, callbacks=[record]).fit(model, loader)
    # a restart after step 22, and a tenth of 22 steps of ramp
    assert record.seen == pytest.approx([0, 0.05, *[0.1] * 20, 0, 0.05, *[0.1] * 20])


@pytest.mark.parametrize("method", [LoRAPro(rank=2), GaLore(rank=2)])
def test_a_method_may_have_an_optimizer_of_its_own_which_sees_clipped_gradients(classifier, trainer, loader, method):
    model = classifier(method=method, optimizer="sgd", momentum=0.0, lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.net.named_parameters()}
    run = trainer(max_steps=2, gradient_clip_val=1e-6)
    run.fit(model, loader)
    assert type(run.optimizers[0]) is method.own_optimizer
    moved = max(
        float((parameter.detach() - before[name]).abs().max()) for name, parameter in model.net.named_parameters()
    )
    assert 0 < moved < 1e-6


def test_a_method_with_an_optimizer_of_its_own_refuses_another(classifier, trainer, loader):
    with pytest.raises(UserError, match=mentions("model.optimizer", "'torch.optim.NAdam'", "adamw and sgd")):
        trainer(max_steps=2).fit(classifier(method=GaLore(rank=2), optimizer="torch.optim.NAdam"), loader)


def test_a_longer_resumed_run_gets_the_longer_schedule(classifier, trainer, loader, tmp_path):
    first = trainer(max_steps=4)
    first.fit(classifier(schedule="linear"), loader)
    first.save_checkpoint(tmp_path / "4.ckpt")
    record = Record(lambda t, m: t.optimizers[0].param_groups[0]["lr"])
    trainer(max_steps=8, callbacks=[record]).fit(classifier(schedule="linear"), loader, ckpt_path=tmp_path / "4.ckpt")
    assert record.seen[1:] == pytest.approx([0.1 * (1 - step / 8) for step in (5, 6, 7)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": 0.0}, ["model.lr", "0.0"]),
        ({"lr": float("nan")}, ["model.lr", "nan"]),
        ({"head_lr": -1.0}, ["model.head_lr", "-1.0"]),
        ({"momentum": 1.0}, ["model.momentum", "1.0"]),
        ({"weight_decay": -0.1}, ["model.weight_decay", "-0.1"]),
        ({"warmup_steps": -1}, ["model.warmup_steps", "-1"]),
        ({"schedule": "cosin"}, ["model.schedule", "'cosin'", "'cosine'"]),
        ({"optimizer": "adamv"}, ["model.optimizer", "'adamv'", "'adamw'"]),
        ({"num_classes": 1}, ["model.num_classes", "1"]),
        ({"label_smoothing": 1.0}, ["model.label_smoothing", "1.0"]),
        ({"mixup": -0.1}, ["model.mixup", "-0.1"]),
        ({"cutmix": -0.1}, ["model.cutmix", "-0.1"]),
        (
            {"method": {"class_path": "srlora_pl.SRLora"}},
            ["class_path", "'srlora_pl.SRLora'", "'srlora_pl.SRLoRA'"],
        ),
    ],
)
def test_values_out_of_range_are_refused_when_the_model_is_made(classifier, arguments, words):
    with pytest.raises(UserError, match=mentions(*words)):
        classifier(**arguments)


def test_a_run_that_cannot_hold_its_schedule_is_refused(classifier, trainer, loader):
    with pytest.raises(UserError, match=mentions("model.warmup_steps", "7", "6")):
        trainer().fit(classifier(warmup_steps=7), loader)
    with pytest.raises(UserError, match=mentions("'linear'", "trainer.max_steps")):
        trainer(max_steps=-1, max_epochs=-1).fit(classifier(schedule="linear"), loader)


def test_rehearsals_may_be_shorter_than_the_warm_up(classifier, trainer, loader):
    trainer(fast_dev_run=True).fit(classifier(warmup_steps=500), loader, loader)
    model = classifier(warmup_steps=50)
    run = trainer(max_steps=60, logger=True)
    finder = Tuner(run)
    found = finder.lr_find(model, loader, num_training=40, max_lr=1e20, early_stop_threshold=None)
    assert found is not None
    assert not math.isfinite(found.results["loss"][-1])  # a finder may diverge
    assert model.lr == found.suggestion()
    model.lr = 0.1
    run.fit(model, loader)
    assert run.global_step == 60


# The loss


def test_mixing_is_a_function_of_the_step(classifier, trainer, loader):
    class Disturb(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            torch.rand(5)

    def mixed(callbacks: list[Callback]) -> list[Tensor]:
        model, seen = classifier(mixup=0.4, cutmix=1.0), []
        model.net.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        L.seed_everything(3, verbose=False)
        # one batch again and again, so that only the mixing differs from step to step
        trainer(overfit_batches=1, limit_val_batches=0, callbacks=callbacks).fit(model, loader)
        return seen

    plain, disturbed = mixed([]), mixed([Disturb()])
    assert len(plain) == 6
    assert all(torch.equal(a, b) for a, b in zip(plain, disturbed, strict=True))
    assert len({image.numpy().tobytes() for image in plain}) == 6


def test_mixed_labels_and_smoothing_act_in_training_only(classifier):
    batch = torch.utils.data.default_collate(samples(8))
    model = classifier(label_smoothing=0.2).eval()
    logits, label = model.logits(batch), batch["label"]
    log = logits.log_softmax(-1)
    expected = -(0.8 * log[torch.arange(8), label] + 0.2 * log.mean(-1)).mean()
    assert torch.allclose(model.training_loss(batch), expected)
    assert torch.allclose(model.losses(logits, label), F.nll_loss(log, label, reduction="none"))
    model = classifier(mixup=1.0).eval()
    torch.manual_seed(1)
    image, mixed = model.mix(batch["image"], label)
    torch.manual_seed(1)
    assert torch.allclose(model.training_loss(batch), -(mixed * model(image).log_softmax(-1)).sum(-1).mean())
    assert ((mixed > 0) & (mixed < 1)).any()


class Poison(Callback):
    """Makes the images of one micro-batch NaN."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.at:
            batch["image"].fill_(float("nan"))


def test_a_non_finite_loss_stops_at_the_next_log(classifier, trainer, loader):
    run = trainer(max_steps=20, log_every_n_steps=4, callbacks=[Poison(at=5)])
    with pytest.raises(UserError, match=mentions("NaN", "steps 5 to 8", "model.lr")):
        run.fit(classifier(), loader)
    assert run.global_step == 8


def test_no_poisoned_checkpoint_is_written(classifier, trainer, loader, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    run = trainer(max_steps=20, log_every_n_steps=50, enable_checkpointing=True, callbacks=[Poison(at=4), keep])
    with pytest.raises(UserError, match=mentions("steps 4 to 6")):
        run.fit(classifier(), loader)
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["step=3.ckpt"]
    state = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def test_a_non_finite_loss_at_the_end_is_told(classifier, trainer, loader):
    with pytest.raises(UserError, match=mentions("steps 1 to 6")):
        trainer(log_every_n_steps=50, callbacks=[Poison(at=5)]).fit(classifier(), loader)


# Scores


@pytest.mark.parametrize("stage", ["val", "test"])
def test_scores_are_those_of_scikit_learn_on_the_whole_split(classifier, trainer, stage):
    data = samples(22)
    model = classifier(label_smoothing=0.1, mixup=1.0).eval()
    whole = torch.utils.data.default_collate(data)
    probability = model(whole["image"]).softmax(-1).detach().double().numpy()
    probability /= probability.sum(-1, keepdims=True)
    label, classes = whole["label"].numpy(), list(range(CLASSES))
    run = trainer()
    loader = DataLoader(data, batch_size=4)  # type: ignore[arg-type]
    (scores,) = run.validate(model, loader, verbose=False) if stage == "val" else run.test(model, loader, verbose=False)
    assert scores == pytest.approx(
        {
            f"{stage}/accuracy": accuracy_score(label, probability.argmax(-1)),
            f"{stage}/score": accuracy_score(label, probability.argmax(-1)),
            f"{stage}/top5": top_k_accuracy_score(label, probability, k=5, labels=classes),
            f"{stage}/loss": log_loss(label, probability, labels=classes),
        }
    )
    assert scores[f"{stage}/accuracy"] < scores[f"{stage}/top5"] < 1


def test_scores_start_anew_at_every_validation(classifier, trainer, loader):
    run, model = trainer(), classifier()
    first, second = (run.validate(model, loader, verbose=False) for _ in range(2))
    assert first == second


def test_no_top5_of_five_classes(classifier, trainer):
    data = [sample | {"label": sample["label"] % 5} for sample in samples(8)]
    (scores,) = trainer().validate(classifier(num_classes=5), DataLoader(data, batch_size=4), verbose=False)  # type: ignore[arg-type]
    assert set(scores) == {"val/accuracy", "val/score", "val/loss"}


def test_predictions_name_their_samples(classifier, trainer):
    data = [{key: value for key, value in sample.items() if key != "label"} for sample in samples(6)]
    model = classifier()
    batches = trainer().predict(model, DataLoader(data, batch_size=4))  # type: ignore[arg-type]
    together = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    logits = model.eval()(torch.stack([sample["image"] for sample in data]))
    assert together["index"].tolist() == list(range(6))
    assert torch.equal(together["label"], logits.argmax(-1))
    assert torch.allclose(together["probability"], logits.softmax(-1).amax(-1))


def test_more_classes_in_the_data_than_in_the_head_are_refused(classifier, trainer, loader):
    class Data(L.LightningDataModule):
        num_classes = CLASSES + 1

        def train_dataloader(self) -> DataLoader:
            return loader

    with pytest.raises(UserError, match=mentions("8 classes", "model.num_classes", "7")):
        trainer().fit(classifier(), datamodule=Data())


# Checkpoints


def test_only_weights_that_come_from_somewhere_are_left_out(classifier, trainer, loader, tmp_path):
    weights = tmp_path / "w.safetensors"
    save_file(build_backbone("vit_tiny_patch16_224", CLASSES, SMALL_VIT).state_dict(), weights)
    for checkpoint, is_whole in ((None, True), (str(weights), False)):
        model = classifier(backbone_checkpoint=checkpoint)
        run = trainer()
        run.fit(model, loader)
        run.save_checkpoint(tmp_path / "a.ckpt")
        saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
        assert ("net.patch_embed.proj.weight" in saved) == is_whole
        assert {"net.head.weight", "net.blocks.0.attn.qkv.lora_A"} <= set(saved)


@pytest.mark.parametrize("method", [LoRA(rank=2, alpha=3.0), PiSSA(rank=3), SRLoRA(target_rank=4, rank=2)])
def test_a_checkpoint_makes_the_model_again(classifier, trainer, loader, tmp_path, method):
    weights = tmp_path / "w.safetensors"
    save_file(build_backbone("vit_tiny_patch16_224", CLASSES, SMALL_VIT).state_dict(), weights)
    model = classifier(method=method, mixup=0.3, head_lr=0.02, backbone_checkpoint=str(weights))
    run = trainer()
    run.fit(model, loader)
    run.save_checkpoint(tmp_path / "a.ckpt")
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert kept["method"] == method.spec()
    again = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    images = torch.stack([sample["image"] for sample in samples(5)])
    assert torch.equal(again.eval()(images), model.eval()(images))
    assert again.head_lr == 0.02
    assert again.adaptation.method.spec() == method.spec()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_classes": 9}, ["model.num_classes", "7", "9"]),
        ({"backbone": "vit_small_patch16_224"}, ["model.backbone", "'vit_tiny_patch16_224'"]),
        ({"backbone_kwargs": SMALL_VIT | {"depth": 3}}, ["model.backbone_kwargs"]),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(classifier, trainer, loader, tmp_path, change, words):
    run = trainer(max_steps=1)
    run.fit(classifier(), loader)
    run.save_checkpoint(tmp_path / "a.ckpt")
    for start in (trainer().fit, trainer().test):
        with pytest.raises(UserError, match=mentions(*words)):
            start(classifier(**change), loader, ckpt_path=tmp_path / "a.ckpt")


def test_methods_from_their_spec():
    spec = SRLoRA(target_rank=16, rank=4).spec()
    assert from_spec(spec).spec() == spec
    assert type(from_spec({"class_path": "srlora_pl.lowrank.methods.lora.LoRA"})) is LoRA

    class Own(LoRA):
        pass

    assert type(from_spec({"class_path": f"{__name__}.{Own.__qualname__}", "init_args": {"rank": 3}})) is Own
    for path in ("os.system", "torch.nn.Linear", "srlora_pl.lowrank.Nothing"):
        with pytest.raises(UserError, match=mentions("no method")):
            from_spec({"class_path": path, "init_args": {"command": "true"}})


def test_compile_takes_each_block_that_holds_adapters(classifier, monkeypatch):
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, *args, **kwargs: compiled.append(module))
    model = classifier(compile=True)
    assert compiled == list(model.net.blocks)
    compiled.clear()
    model = classifier(compile=True, method=LoRA(rank=2, layers="1"))
    assert compiled == [model.net.blocks[1]]
    compiled.clear()
    model = classifier(compile=True, method=Full())
    assert compiled == list(model.net.blocks)


def test_matmul_precision_holds_during_a_run(classifier, trainer, loader):
    seen = Record(lambda trainer, module: torch.get_float32_matmul_precision())
    trainer(callbacks=[seen], max_steps=1).fit(classifier(matmul_precision="high"), loader)
    assert (seen.seen, torch.get_float32_matmul_precision()) == (["high"], "highest")
    with pytest.raises(UserError, match=mentions("model.matmul_precision", "tf32", "highest")):
        classifier(matmul_precision="tf32")


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_batch_end"])
def test_a_run_that_raises_gives_the_matmul_precision_back(hook, classifier, trainer, loader):
    class Fails(Callback):
        pass

    def fail(*args, **kwargs):
        raise ArithmeticError

    setattr(Fails, hook, fail)
    with pytest.raises(ArithmeticError):
        trainer(callbacks=[Fails()], max_steps=1).fit(classifier(matmul_precision="high"), loader)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_resume_with_another_learning_rate_is_refused_and_a_test_is_not(classifier, trainer, loader, tmp_path):
    """The optimizer's state holds the old rate, and would bring it back without a word."""
    run = trainer(max_steps=2)
    run.fit(classifier(lr=0.1), loader)
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=mentions("model.lr", "0.1", "0.5")):
        trainer().fit(classifier(lr=0.5), loader, ckpt_path=tmp_path / "a.ckpt")
    trainer().test(classifier(lr=0.5), loader, ckpt_path=tmp_path / "a.ckpt", verbose=False)


@pytest.mark.parametrize("collapsed", [True, False])
def test_one_class_for_every_sample_is_said_once_at_the_end(collapsed, classifier, trainer, loader, caplog):
    def model():
        made = classifier()
        logits = made.logits
        made.logits = lambda batch: (
            logits(batch) + 1e4 * F.one_hot(3 + (batch["index"] // 21) * (not collapsed), CLASSES)
        )
        return made

    def said():
        found = re.findall(r"All (\d+) predictions on (\w+) are class '(\w+)'", caplog.text)
        caplog.clear()
        return found

    with caplog.at_level("INFO"):
        fitted, run = model(), trainer(max_steps=4, val_check_interval=1)
        run.fit(fitted, loader, loader)
        assert said() == [("22", "val", "3")] * collapsed
        assert "val/one_class" not in run.callback_metrics
        run.test(fitted, loader, verbose=False)
        assert said() == []  # once
        run.test(model(), loader, verbose=False)
        assert said() == [("22", "test", "3")] * collapsed
        run.validate(model(), loader, verbose=False)
        assert said() == [("22", "val", "3")] * collapsed
