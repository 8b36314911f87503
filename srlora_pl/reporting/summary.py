"""summary.json: a run's results, for programs to read."""

import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from srlora_pl.reporting.progress import adaptation_of, parameter_counts
from srlora_pl.util import json_text, system
from srlora_pl.util.files import write_whole

FILE = "summary.json"


class Summary(Callback):
    """Counts the seconds of a run over resumes, and writes its ``summary.json``.

    Attributes:
        seconds: from the start of training to now or its end, validations included.
        earlier: those of the processes before this one.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.earlier, self._done, self._begin = 0.0, 0.0, 0.0
        self._is_stale = self._fits = True
        self._commit: str | None = None  # at the beginning: the files may be changed while the run goes on
        self._events = {"switches": 0}  # at the end of training: the test that follows loads an earlier checkpoint

    @property
    def seconds(self) -> float:
        return self._done + (time.perf_counter() - self._begin if self._begin else 0.0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._fits = stage == "fit"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin = time.perf_counter()
        self._commit = system.commit()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._is_stale and trainer.is_global_zero:
            self.path.unlink(missing_ok=True)  # of the same run, which ended here before
        self._is_stale = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done, self._begin = self.seconds, 0.0
        controller = adaptation_of(pl_module).controller
        self._events |= {controller.events: controller.progress().done}

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fits:  # and no test that follows, of an earlier checkpoint
            self.earlier = self._done = state_dict["seconds"]

    def write(
        self, trainer: Trainer, module: LightningModule, scores: Mapping[str, float], best: Mapping[str, Any]
    ) -> None:
        """Write ``summary.json`` once the run has ended.

        Args:
            scores: the last ones, of the test data where they have labels.
            best: ``monitor``, ``mode`` and ``value`` of the ``checkpoint`` that validation chose; empty if none was.
        """
        device = trainer.strategy.root_device
        content = {
            "command": shlex.join(sys.argv),
            "method": adaptation_of(module).method.spec(),
            "steps": trainer.global_step,
            **self._events,
            "scores": dict(scores),
            "best": dict(best),
            "seconds": self.seconds,
            "peak_memory": system.peak_memory_bytes(device),
            "parameters": parameter_counts(module),
            "device": system.device_name(device),
            "commit": self._commit,
            "versions": system.versions(),
        }
        write_whole(self.path, json_text.write(content))
