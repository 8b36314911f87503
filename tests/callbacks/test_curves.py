"""TensorBoard's files of one run are read in the order in which they were begun."""

from pathlib import Path

from srlora_pl.callbacks.curves import ContinuedTensorBoardLogger


def test_files_of_one_folder_begin_in_seconds_of_their_own(tmp_path: Path) -> None:
    begun = []
    for step in range(3):
        logger = ContinuedTensorBoardLogger(tmp_path, name="", version="")
        logger.log_metrics({"loss": 0.0}, step)
        begun += [file for file in tmp_path.glob("events.*") if file not in begun]
        logger.finalize("success")
    seconds = [file.name.split(".")[3] for file in begun]
    assert len(begun) == 3
    assert len(set(seconds)) == 3
    assert seconds == sorted(seconds)
