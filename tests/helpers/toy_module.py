"""Somebody's LightningModule around the toy network, with its data and its trainer."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from srlora_pl import SRLoRAMixin
from srlora_pl.lowrank import SRLoRA
from tests.helpers.toys import toy_batches, toy_net


class Toy(SRLoRAMixin, L.LightningModule):
    """Somebody's module: it knows nothing of the adaptation but the call of adapt()."""

    def __init__(self, method=None, optimizer=torch.optim.AdamW, lr=0.01, **options):
        super().__init__()
        self.net = toy_net()
        self.adapt(self.net, method or srlora())
        self.optimizer, self.lr, self.options = optimizer, lr, options

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        trainable = [p for p in self.parameters() if p.requires_grad]
        return self.optimizer(trainable, lr=self.lr, **self.options)


def srlora(**options):
    return SRLoRA(**{"rank": 4, "alpha": 8.0, "target_rank": 12, **options})


def loader(count=40, dtype=torch.float32):
    return DataLoader(toy_batches(count, dtype=dtype), batch_size=None)


def trainer(tmp_path=None, **options):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": 40,
        "default_root_dir": tmp_path,
    }
    return L.Trainer(**{**defaults, **options})
