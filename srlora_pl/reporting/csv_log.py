"""metrics.csv that a resumed run goes on in."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from srlora_pl.util.files import replacing

Row = dict[str, Any]


class ContinuedCSVLogger(CSVLogger):
    """Lightning's CSVLogger deletes the metrics.csv that it finds; this one appends to it.

    Attributes:
        latest: the rows of the step that was logged last.
    """

    latest: list[Row]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.latest = []

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:  # type: ignore[override]
        """The writer behind the logger."""
        if not isinstance(self._experiment, _AppendingWriter):
            self._experiment = _AppendingWriter(self.log_dir)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:  # type: ignore[override]
        """Add a row."""
        super().log_metrics(metrics, step)  # type: ignore[arg-type]
        self.latest = [row for row in self.latest if row["step"] == step] + [{**metrics, "step": step}]

    @rank_zero_only
    def cut(self, step: int) -> None:
        """Take ``step`` and all later ones out of the file, at once."""
        self.experiment.cut(step)
        self.latest = []


class _AppendingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Where the base class clears the folder: take over the columns of what is there."""
        if self._fs.isfile(self.metrics_file_path):
            with self._fs.open(self.metrics_file_path, "r", newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def cut(self, step: int) -> None:
        if self._fs.isfile(self.metrics_file_path):
            # A row that a dying process wrote half has no value, not even an empty one, in its last column.
            whole = (row for row in self._rows() if None not in row.values())
            self._write(row for row in whole if int(row["step"]) < step)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write(self._rows())

    def _rows(self) -> list[Row]:
        with self._fs.open(self.metrics_file_path, "r", newline="") as file:
            return list(csv.DictReader(file))

    def _write(self, rows: Iterable[Row]) -> None:
        with replacing(Path(self.metrics_file_path)) as file:
            text = io.TextIOWrapper(file, "utf-8", newline="")
            writer = csv.DictWriter(text, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
            text.flush()
            text.detach()
