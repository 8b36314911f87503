"""The files that ``predict`` writes."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor, distributed

from srlora_pl.data.protocols import data_of
from srlora_pl.util.files import write_whole, writing_to

Row = dict[str, Any]


class PredictionWriter(BasePredictionWriter):
    """Writes a row for every sample, in the order of the data, at the end; the first process writes for all.

    Takes from `predict_step` a mapping with ``index`` (B,) and one of: ``label`` (B,) and ``probability`` (B,); for
    several labels a sample ``probabilities`` (B, classes); for numbers ``value`` (B,). The CSV has the columns
    ``sample`` and ``label``, ``probability``; or ``label`` (those above 0.5, with ``|`` between) and
    ``probability_CLASS`` of each; or ``value``. Names of samples and classes are the DataModule's (`sample_name`,
    `class_names`).

    Attributes:
        files: the files that this process wrote in the last prediction.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self.files: list[Path] = []
        self._tables: dict[int, list[Row]] = defaultdict(list)  # by data loader

    @property
    def rows(self) -> int:
        """How many samples have been predicted."""
        return sum(map(len, self._tables.values()))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.files.clear()
        self._tables = defaultdict(list)

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
        columns = (prediction[name].tolist() for name in prediction)
        rows = (dict(zip(prediction, row, strict=True)) for row in zip(*columns, strict=True))
        self._tables[dataloader_idx].extend(rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tables = _gathered(self._tables)
        for loader, table in sorted(self._tables.items()):
            self._write(trainer, loader, table)

    def _write(self, trainer: Trainer, loader: int, table: list[Row]) -> None:
        data = data_of(trainer)
        rows = [{"sample": data.sample_name(row["index"])} | _named(row, data.class_names) for row in table]
        self._save(self.path, ",", rows)

    def _save(self, path: Path, delimiter: str, rows: list[Row]) -> None:
        # A row ends in CR and LF at first, so that a name with either of them is quoted.
        writer: Any = csv.DictWriter(SimpleNamespace(write=str), list(rows[0]), delimiter=delimiter)
        lines = [writer.writeheader(), *map(writer.writerow, rows)]
        text = "".join(line.removesuffix("\r\n") + "\n" for line in lines)
        with writing_to(f"--output {path}"):
            # A name that is not UTF-8 keeps its bytes, as Python writes them: \\udce9 for 0xe9.
            write_whole(path, text.encode(errors="backslashreplace"))
        self.files.append(path)


class GLUEWriter(PredictionWriter):
    """Writes GLUE submission files, under the names that its server asks for, into the folder ``path``.

    Columns ``index`` and ``prediction``, with a tab between; labels in the words of the task's own files, numbers
    clipped to 0-5, the range of STS-B. A file that does not have every sample, which the server refuses, is named
    ``CoLA.part.tsv`` and takes the place of no whole one.
    """

    def _write(self, trainer: Trainer, loader: int, table: list[Row]) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]

        def prediction(row: Row) -> str:
            return data.task.words[row["label"]] if "label" in row else f"{min(max(row['value'], 0.0), 5.0):.3f}"

        rows = [{"index": row["index"], "prediction": prediction(row)} for row in table]
        sets = data.predict_set if isinstance(data.predict_set, list) else [data.predict_set]
        path = self.path / data.task.submissions[loader]
        self._save(path if len(rows) == len(sets[loader]) else path.with_suffix(".part.tsv"), "\t", rows)


def _gathered(tables: Mapping[int, list[Row]]) -> dict[int, list[Row]]:
    """The rows of all processes in the order of the data, in the first process; none in the others."""
    parts: list[Any] = [tables]
    if distributed.is_available() and distributed.is_initialized():
        is_first = distributed.get_rank() == 0
        parts = [None] * distributed.get_world_size() if is_first else []
        distributed.gather_object(tables, parts if is_first else None)
    # By index, the first process last: a process with fewer samples repeats one of its samples as padding.
    by_index = {loader: {row["index"]: row for part in reversed(parts) for row in part[loader]} for loader in tables}
    return {loader: [table[index] for index in sorted(table)] for loader, table in by_index.items() if table}


def _named(row: Row, classes: Sequence[str]) -> Row:
    """The columns of a prediction in words."""
    if "value" in row:
        return {"value": f"{row['value']:.6f}"}
    if "label" in row:
        return {"label": classes[row["label"]], "probability": f"{row['probability']:.6f}"}
    likely = [name for name, probability in zip(classes, row["probabilities"], strict=True) if probability > 0.5]
    each = {f"probability_{name}": f"{p:.6f}" for name, p in zip(classes, row["probabilities"], strict=True)}
    return {"label": "|".join(likely)} | each
