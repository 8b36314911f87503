"""A task and a trainer for short runs on a few of the shipped digits."""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from srlora_pl import ImageClassifier, ImageData, SRLoRA

STEPS = 14
SHAPE = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
BACKBONE = {}


def model(drops=True, **options):
    """A small classifier; ``drops``: with dropout and stochastic depth."""
    torch.manual_seed(0)
    kwargs = {**SHAPE, **({"proj_drop_rate": 0.2, "drop_path_rate": 0.2} if drops else {})}
    method = SRLoRA(rank=2, alpha=4.0, target_rank=6, dropout=0.1)
    defaults = {"method": method, "optimizer": "adamw", "lr": 0.01, "warmup_steps": 3, "mixup": 0.3, "cutmix": 0.3}
    return ImageClassifier(
        backbone=BACKBONE["folder"], num_classes=10, backbone_kwargs=kwargs, **{**defaults, **options}
    )


class SmallDigits(ImageData):
    """A few of the shipped digits, so that a run has several epochs."""

    def __init__(self, **options):
        super().__init__(name="digits", **{"batch_size": 8, **options})

    def load(self, stage):
        super().load(stage)
        for name, size in (("train_set", 60), ("val_set", 20)):
            full = getattr(self, name)
            if full is not None:
                full.rows = full.rows[:size]


def trainer(folder, *callbacks, **options):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": STEPS,
        "max_epochs": -1,
        "val_check_interval": 5,
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
    }
    every = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}", save_last=True)
    return L.Trainer(**{**defaults, **options}, callbacks=[every, *callbacks])


def final(module):
    scores = module.adaptation.controller.state_dict()
    return {**module.state_dict(), **{name: value for name, value in scores.items() if isinstance(value, torch.Tensor)}}


def assert_equal(one, other):
    for key, value in final(one).items():
        assert torch.equal(value, final(other)[key]), key
    assert one.adaptation.controller.progress().done == other.adaptation.controller.progress().done
