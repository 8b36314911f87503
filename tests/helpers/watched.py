"""A run with figures at every validation, and its TensorBoard files read back."""

from dataclasses import dataclass
from pathlib import Path

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from srlora_pl import ImageClassifier
from tests.helpers.cli import SMALL_RUN, cli

FIT = ["fit", "--config", "small.yaml", "--ckpt_path", "last"]
HPARAMS = ("_hparams_/experiment", "_hparams_/session_start_info")


@dataclass
class Watched:
    """A run of SMALL_RUN with figures at every validation."""

    folder: Path
    out: str

    def __post_init__(self) -> None:
        sizes = {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
        self.events = EventAccumulator(str(self.folder), sizes).Reload()

    def curve(self, tag: str) -> tuple[list[int], list[float]]:
        events = self.events.Scalars(tag)
        return [event.step for event in events], [event.value for event in events]

    def last_state(self) -> ImageClassifier:
        return ImageClassifier.load_from_checkpoint(self.folder / "checkpoints/last.ckpt")

    def sessions(self) -> int:
        """How often a session of the HParams tab begins in the files."""
        files = sorted(self.folder.glob("events*"))
        events = (event for file in files for event in EventFileLoader(str(file)).Load())
        return sum(value.tag == HPARAMS[1] for event in events for value in event.summary.value)

    def hparams(self, tag: str) -> HParamsPluginData:
        return HParamsPluginData.FromString(self.events.SummaryMetadata(tag).plugin_data.content)


def prepared(home: Path) -> Path:
    settings = yaml.safe_load(SMALL_RUN)
    monitor = {"class_path": "srlora_pl.reporting.Monitor", "init_args": {"figures_at_validation": True}}
    settings["trainer"] |= {"callbacks": [monitor], "enable_model_summary": True}
    home.mkdir(parents=True, exist_ok=True)
    (home / "small.yaml").write_text(yaml.safe_dump(settings))
    return home


def finished(home: Path) -> Watched:
    code, out, err = cli(*FIT, home=home)
    assert code == 0, err
    return Watched(home / "runs/small-srlora/version_0", out)
