"""A tiny model that records its batches, and ways to build data on disk."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from srlora_pl.data.base import DataModule
from srlora_pl.training.resume import ExactResume


def data_config(size: int = 16, interpolation: str = "bicubic") -> dict[str, Any]:
    return {
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "input_size": (3, size, size),
        "interpolation": interpolation,
    }


class Recorder(ExactResume, L.LightningModule):
    """Trains a linear layer and keeps what it saw: (indices, checksum of the pixels) of every training batch."""

    def __init__(self, size: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.data_config, self.num_classes = data_config(size), num_classes
        self.head = nn.Linear(3 * size * size, num_classes)
        self.seen: list[tuple[list[int], float]] = []

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        self.seen.append((batch["index"].tolist(), batch["image"].double().sum().item()))
        return nn.functional.cross_entropy(self.head(batch["image"].flatten(1)), batch["label"])

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Asking for the steps makes Lightning build the training iterator before it restores its counters.
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.01)


def attach(data: DataModule, processed: int = 0, size: int = 16, limit: int | float = 1.0, **more: Any) -> Any:
    """``data`` with a stand-in for a trainer after ``processed`` micro-batches."""
    progress = SimpleNamespace(total=SimpleNamespace(processed=processed))
    defaults = {"global_rank": 0, "world_size": 1, "overfit_batches": 0, "limit_predict_batches": 1.0}
    defaults |= {"state": SimpleNamespace(fn="fit")}
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        precision_plugin=SimpleNamespace(convert_input=lambda batch: batch),
        lightning_module=SimpleNamespace(data_config=data_config(size)),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        limit_train_batches=limit,
        **{**defaults, **more},
    )
    return data


@pytest.fixture
def image_tree(tmp_path: Path) -> Callable[..., Path]:
    """Write PNGs, ``count`` to a class: ``image_tree({"train/cat": (20, 24)}, count=3)``, sizes as (width, height)."""

    def _write(folders: dict[str, tuple[int, int]], count: int = 6, root: Path = tmp_path / "pictures") -> Path:
        rng = np.random.default_rng(0)
        for folder, (width, height) in folders.items():
            (root / folder).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{index}.png")
        return root

    return _write
