"""The command line and checkpoints know every argument of a task, also those that its base class documents."""

from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from srlora_pl import ImageClassifier, LoRA, TextClassifier
from srlora_pl.models.timm_family import Timm
from srlora_pl.tasks.base import Task
from srlora_pl.tasks.evaluation import LogitScores
from srlora_pl.util.errors import UserError
from srlora_pl.util.signatures import arguments_of
from tests.helpers.encoders import BERT, folder
from tests.helpers.images import SMALL_VIT, samples

# A contract: config files and older checkpoints hold these names.
SHARED = {
    "method",
    "backbone_checkpoint",
    "weights",
    "adapter",
    "optimizer",
    "lr",
    "head_lr",
    "momentum",
    "weight_decay",
}
SHARED |= {"schedule", "warmup_steps", "compile", "matmul_precision", "checkpoints"}
CLASSIFIER = SHARED | {"backbone", "num_classes", "backbone_kwargs", "label_smoothing"}
TEXT = {"train_pooler", "problem", "score_names", "class_weights", "fast_attention"}
ARGUMENTS = {ImageClassifier: CLASSIFIER | {"mixup", "cutmix"}, TextClassifier: CLASSIFIER | TEXT}


@pytest.mark.parametrize("task", ARGUMENTS)
def test_the_parser_finds_every_argument_with_its_help(task):
    parser = ArgumentParser()
    parser.add_class_arguments(task)
    found = {action.dest: action.help for action in parser._actions if action.dest not in ("help", "method.help")}
    assert found.keys() == ARGUMENTS[task]
    assert [name for name, text in found.items() if len(text or "") < 10] == []


def test_a_checkpoint_holds_every_argument(tmp_path):
    text = TextClassifier(folder(tmp_path, BERT), 2, LoRA(rank=2), {"pretrained": False})
    for model in (ImageClassifier("vit_tiny_patch16_224", 3, LoRA(rank=2), SMALL_VIT), text):
        assert set(model.hparams) == ARGUMENTS[type(model)]


def test_tasks_keep_their_own_defaults():
    defaults = {}
    for task in ARGUMENTS:
        parser = ArgumentParser()
        parser.add_class_arguments(task)
        defaults[task] = {key: parser.get_defaults()[key] for key in ("lr", "schedule", "optimizer", "checkpoints")}
    assert list(defaults[ImageClassifier].values()) == [1e-3, "cosine", "adamw", "compact"]
    assert list(defaults[TextClassifier].values()) == [1e-4, "linear", "adamw", "compact"]


class Regression(Task):
    """A third task: the mean of the outputs is a number."""

    def __init__(
        self, backbone: str, method: Any, backbone_kwargs: Any = None, *, power: int = 2, **kwargs: Any
    ) -> None:
        arguments = arguments_of(locals())
        super().__init__(method, **kwargs)
        self.power = power
        self.evaluation = LogitScores({}, "loss")
        self.build(Timm(backbone, 3, backbone_kwargs, self.hparams["backbone_checkpoint"]), arguments)

    def logits(self, batch: Any) -> Tensor:
        return self.family.logits(self.net, batch).mean(-1)

    def losses(self, logits: Tensor, label: Tensor) -> Tensor:
        return (logits - label).abs() ** self.power


def test_a_third_task_is_small(trainer, loader, tmp_path):
    model = Regression("vit_tiny_patch16_224", LoRA(rank=2), SMALL_VIT, power=4, lr=0.01, warmup_steps=1)
    run = trainer(max_steps=3)
    run.fit(model, loader, loader)
    whole = torch.utils.data.default_collate(samples(22))
    with torch.no_grad():
        expected = ((model.eval().logits(whole) - whole["label"]) ** 4).mean()
    assert run.callback_metrics["val/score"] == run.callback_metrics["val/loss"] == pytest.approx(float(expected))
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = Regression.load_from_checkpoint(tmp_path / "a.ckpt")
    assert set(again.hparams) == SHARED | {"backbone", "backbone_kwargs", "power"}
    assert (again.power, again.lr, again.warmup_steps) == (4, 0.01, 1)
    assert torch.equal(again.eval().logits(whole), model.logits(whole))
    with pytest.raises(UserError, match=r"model\.momentum"):
        Regression("vit_tiny_patch16_224", LoRA(rank=2), SMALL_VIT, momentum=1.0)
