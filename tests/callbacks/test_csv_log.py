"""metrics.csv is gone on with, not begun anew."""

import csv
import warnings
from pathlib import Path

from srlora_pl.callbacks import ContinuedCSVLogger


def write(folder: Path, *rows: dict[str, float]) -> None:
    logger = ContinuedCSVLogger(folder, "", "run")
    for step, row in enumerate(rows):
        logger.log_metrics(row, step)
    logger.finalize("success")


def test_a_second_logger_appends_and_adds_columns(tmp_path: Path) -> None:
    write(tmp_path, {"a": 1.0, "c": 2.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(tmp_path, {"c": 3.0}, {"b": 4.0})
    with (tmp_path / "run/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["a"], row["b"], row["c"]) for row in rows] == [("1.0", "", "2.0"), ("", "", "3.0"), ("", "4.0", "")]
