"""A network and data of a few kilobytes, in the form that the tasks meet them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from srlora_pl import ImageClassifier, LoRA

SMALL_VIT: dict[str, Any] = {
    "pretrained": False,
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
}
CLASSES = 7


@pytest.fixture
def classifier() -> Callable[..., ImageClassifier]:
    """Makes a small `ImageClassifier`; keyword arguments override its own."""

    def make(**overrides: Any) -> ImageClassifier:
        torch.manual_seed(0)
        arguments = {
            "backbone": "vit_tiny_patch16_224",
            "num_classes": CLASSES,
            "method": LoRA(rank=2),
            "backbone_kwargs": SMALL_VIT,
            "optimizer": "sgd",
            "lr": 0.1,
        }
        return ImageClassifier(**(arguments | overrides))

    return make


def samples(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return [{"image": images[i], "label": labels[i], "index": torch.tensor(i)} for i in range(count)]


@pytest.fixture
def loader() -> DataLoader:
    """22 samples in batches of 4: the last batch is smaller."""
    return DataLoader(samples(22), batch_size=4)  # type: ignore[arg-type]


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """Makes a quiet CPU `Trainer` that writes under ``tmp_path``."""

    def make(**overrides: Any) -> L.Trainer:
        arguments = {
            "accelerator": "cpu",
            "max_steps": 6,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**(arguments | overrides))

    return make
