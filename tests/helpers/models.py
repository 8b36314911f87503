"""Pretrained models of a few kilobytes in their libraries' own folders, and tasks that trained on top of them."""

from pathlib import Path
from typing import Any

import timm
import torch
from transformers import AutoConfig, AutoModel

from srlora_pl import ImageClassifier, TextClassifier
from srlora_pl.tasks.base import Task
from tests.helpers.encoders import folder
from tests.helpers.texts import WORDS, save_tokenizer

CLASSES = 5
VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def vit_folder(path: Path) -> str:
    """A ViT with fused qkv in timm's layout; of 7 classes, in [-1, 1]."""
    torch.manual_seed(5)
    net = timm.create_model("vit_tiny_patch16_224.augreg_in21k", num_classes=7, **VIT)
    timm.models.save_for_hf(net, str(path), safe_serialization=True)
    return str(path)


def encoder_folder(path: Path, config: dict[str, Any]) -> str:
    """An encoder without a head in transformers' layout, with a tokenizer."""
    torch.manual_seed(5)
    # Weights of the usual size would make the outputs of so small a network nearly the same for all inputs.
    sizes = {"vocab_size": len(WORDS), "max_position_embeddings": 64, "initializer_range": 0.3}
    AutoModel.from_config(AutoConfig.from_pretrained(folder(path, config | sizes))).save_pretrained(path)
    return save_tokenizer(path)


def image_task(backbone: str, method: Any, **options: Any) -> ImageClassifier:
    torch.manual_seed(7)
    return ImageClassifier(**{"backbone": backbone, "num_classes": CLASSES, "method": method, **options})


def text_task(backbone: str, method: Any, **options: Any) -> TextClassifier:
    torch.manual_seed(7)
    return TextClassifier(**{"backbone": backbone, "num_classes": 2, "method": method, **options})


def batch_for(task: Task, size: int = 6, seed: int = 11) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(task.num_classes, (size,), generator=generator)
    if isinstance(task, ImageClassifier):
        return {"image": torch.randn(size, *task.data_config["input_size"], generator=generator), "label": label}
    ids = torch.randint(5, len(WORDS), (size, 12), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "label": label}


def fit(task: Any, steps: int = 8, lr: float = 0.02) -> Any:
    """Train ``task`` for a few steps of a plain loop, and return it."""
    adaptation = task.adaptation
    adaptation.start()
    adaptation.plan(steps)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=lr)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        task.training_loss(batch_for(task, seed=step)).backward()
        adaptation.before_optimizer(step)
        optimizer.step()
        adaptation.after_optimizer(step, optimizer)
    return task
