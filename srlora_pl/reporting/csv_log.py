"""metrics.csv, which a resumed run continues."""

import csv
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from srlora_pl.util.files import write_whole
from srlora_pl.util.tables import csv_of

Row = dict[str, Any]


class ResumableCSVLogger(Logger):
    """Appends to an existing ``metrics.csv`` in ``save_dir``, which Lightning's CSVLogger deletes.

    Args:
        save_dir: its folder; that of the run where the command line gets none.
        flush_logs_every_n_steps: after how many steps rows are written; `save` writes them at once.

    Attributes:
        latest: the rows of the last step.
    """

    name = version = ""

    def __init__(self, save_dir: str | Path = "", flush_logs_every_n_steps: int = 100) -> None:
        super().__init__()
        self._folder = str(save_dir)
        self.file = Path(save_dir, "metrics.csv")
        self.latest: list[Row] = []
        self._unsaved: list[Row] = []
        self._every = flush_logs_every_n_steps

    @property
    def save_dir(self) -> str:
        """The folder of ``metrics.csv``."""
        return self._folder

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: a run's ``config.yaml`` has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:  # type: ignore[override]
        """Add a row."""
        step = len(self._unsaved) if step is None else step
        row = {**convert_tensors_to_scalars(metrics), "step": step}
        self._unsaved.append(row)
        self.latest = [each for each in self.latest if each["step"] == step] + [row]
        if (step + 1) % self._every == 0:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that the file lacks."""
        if not self._unsaved:
            return
        before = self._columns()
        columns = sorted({*before, *chain(*self._unsaved)})
        if columns == before:
            with self.file.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, columns).writerows(self._unsaved)
        else:
            write_whole(self.file, csv_of([*self._rows(), *self._unsaved], columns))
        self._unsaved = []

    @rank_zero_only
    def cut(self, step: int) -> None:
        """Remove ``step`` and all later steps from the file, atomically."""
        if columns := self._columns():
            # A half-written row of a killed process lacks its last columns.
            whole = [row for row in self._rows() if None not in row.values()]
            write_whole(self.file, csv_of([row for row in whole if int(row["step"]) < step], columns))
        self.latest = []

    def _columns(self) -> list[str]:
        if not self.file.is_file():
            return []
        with self.file.open(encoding="utf-8", newline="") as file:
            return next(csv.reader(file), [])

    def _rows(self) -> list[Row]:
        if not self.file.is_file():
            return []
        with self.file.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
