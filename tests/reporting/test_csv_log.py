"""metrics.csv is gone on with, not begun anew."""

import csv
import os
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

from srlora_pl.reporting import ResumableCSVLogger, ResumableCurves


def write(folder: Path, *rows: dict[str, float]) -> None:
    logger = ResumableCSVLogger(folder / "run")
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


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "run/metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_cut_takes_a_step_and_all_later_ones_away(tmp_path: Path) -> None:
    write(tmp_path, {"a": 1.0}, {"b": 2.0}, {"a": 3.0})
    logger = ResumableCSVLogger(tmp_path / "run")
    logger.cut(1)
    assert rows_of(tmp_path) == [{"a": "1.0", "b": "", "step": "0"}]
    logger.log_metrics({"b": 4.0}, 1)
    logger.finalize("success")
    assert [row["b"] for row in rows_of(tmp_path)] == ["", "4.0"]


def test_cut_drops_a_row_that_was_half_written(tmp_path: Path) -> None:
    write(tmp_path, {"a": 1.0, "z": 2.0}, {"a": 3.0, "z": 4.0})
    path = tmp_path / "run/metrics.csv"
    for lost in (5, 8):  # inside the last column, and up to a column before it
        whole = path.read_text()
        path.write_text(whole[:-lost])
        ResumableCSVLogger(tmp_path / "run").cut(1)
        assert rows_of(tmp_path) == [{"a": "1.0", "step": "0", "z": "2.0"}]
        path.write_text(whole)


def test_a_process_that_dies_while_the_file_is_rewritten_loses_nothing(tmp_path: Path) -> None:
    write(tmp_path, {"a": 1.0}, {"a": 2.0})
    before = (tmp_path / "run/metrics.csv").read_text()
    for change in (lambda logger: logger.cut(1), lambda logger: (logger.log_metrics({"b": 1.0}, 2), logger.save())):
        if (child := os.fork()) == 0:
            os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
            change(ResumableCSVLogger(tmp_path / "run"))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert (tmp_path / "run/metrics.csv").read_text() == before


def test_the_rows_of_the_latest_step_are_known(tmp_path: Path) -> None:
    logger = ResumableCSVLogger(tmp_path / "run", flush_logs_every_n_steps=1)
    for step, row in ((0, {"a": 1.0}), (1, {"a": 2.0}), (1, {"b": 3.0})):
        logger.log_metrics(row, step)
    assert logger.latest == [{"a": 2.0, "step": 1}, {"b": 3.0, "step": 1}]


def test_rows_are_on_the_disk_before_a_checkpoint_is(tmp_path: Path) -> None:
    logger = ResumableCSVLogger(tmp_path / "run")
    logger.log_metrics({"a": 1.0}, 3)
    loops = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=4))
    checkpoint: dict = {}
    trainer = SimpleNamespace(loggers=[logger], fit_loop=loops, training=False)
    loops.epoch_loop.batch_progress = SimpleNamespace(total=SimpleNamespace(completed=4, processed=4))
    trainer._logger_connector = None
    ResumableCurves().on_save_checkpoint(trainer, None, checkpoint)
    assert rows_of(tmp_path) == [{"a": "1.0", "step": "3"}]
    assert checkpoint["curves"] == {"step": 4, "rows": []}
