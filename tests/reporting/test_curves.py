"""TensorBoard's files of one run are read in the order in which they were begun."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from srlora_pl.reporting.curves import ResumableTensorBoardLogger


def test_files_of_one_folder_begin_in_seconds_of_their_own(tmp_path: Path) -> None:
    begun = []
    for step in range(3):
        logger = ResumableTensorBoardLogger(tmp_path, name="", version="")
        logger.log_metrics({"loss": 0.0}, step)
        begun += [file for file in tmp_path.glob("events.*") if file not in begun]
        logger.finalize("success")
    seconds = [file.name.split(".")[3] for file in begun]
    assert len(begun) == 3
    assert len(set(seconds)) == 3
    assert seconds == sorted(seconds)


def test_what_a_test_logs_is_not_cut_with_what_was_cut_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a second the tenth file of a process, ``.9``, is read after the eleventh, ``.10``."""
    monkeypatch.setattr(event_file_writer._global_uid, "_value", 9)
    logger = ResumableTensorBoardLogger(tmp_path, name="", version="")
    logger.cut(8)
    logger.log_metrics({"loss": 2.0}, 9)
    logger.finalize("success")
    logger.log_metrics({"loss": 1.0}, 12)
    logger.finalize("success")
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(each.step, each.value) for each in found] == [(9, 2.0), (12, 1.0)]
