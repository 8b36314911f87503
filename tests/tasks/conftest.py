"""A small image classifier and samples for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from srlora_pl import ImageClassifier, LoRA
from tests.helpers.images import CLASSES, SMALL_VIT, samples


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


@pytest.fixture
def loader() -> DataLoader:
    """22 samples in batches of 4: the last batch is smaller."""
    return DataLoader(samples(22), batch_size=4)  # type: ignore[arg-type]
