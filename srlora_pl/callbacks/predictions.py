"""The CSV that ``predict`` writes."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor


class PredictionWriter(BasePredictionWriter):
    """Writes a row (sample, label, probability) for every sample, in the order of the data.

    Takes from `predict_step` a mapping with ``index`` (B,), ``label`` (B,) and ``probability`` (B,); names of
    samples and classes are the DataModule's (`sample_name`, `class_names`). The file appears when all is predicted.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self._table: list[tuple[int, int, float]] = []

    @property
    def rows(self) -> int:
        """How many samples have been predicted."""
        return len(self._table)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Mapping[str, Tensor],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        columns = (prediction[name].tolist() for name in ("index", "label", "probability"))
        self._table.extend(zip(*columns, strict=True))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("sample", "label", "probability"))
            for index, label, probability in sorted(self._table):
                writer.writerow((data.sample_name(index), data.class_names[label], f"{probability:.6f}"))
