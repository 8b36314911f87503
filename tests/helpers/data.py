"""A tiny model that records its batches, and a stand-in for its trainer."""

from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
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
