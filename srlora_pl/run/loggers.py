"""The loggers of a run: ``metrics.csv`` always, and those of ``trainer.logger``."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from srlora_pl.reporting import ResumableCSVLogger, ResumableTensorBoardLogger
from srlora_pl.run import config
from srlora_pl.training import lightning_internals as internals
from srlora_pl.util import yaml_text
from srlora_pl.util.files import write_whole

_RESUMABLE = ("CSVLogger", "TensorBoardLogger", "MLFlowLogger")
_OPTIONS = tuple(f"--trainer.logger{end}" for end in ("", "+", ".class_path"))
_IDS = "loggers.json"  # in the run's folder: by class of logger, the id that the service has given the run


def resumable(settings: config.Node, options: Sequence[str]) -> tuple[config.Node, list[str]]:
    """The config files' ``settings`` and the command line with this package's loggers in the place of Lightning's.

    They go on with the curves of a resumed run. A CSVLogger or a TensorBoardLogger with a ``save_dir``, another place
    than the run's folder, stays Lightning's.
    """
    placed = any(option.startswith("--trainer.logger.") and "save_dir" in option for option in options)

    def ours(node: Any) -> Any:
        if isinstance(node, list):
            return [ours(each) for each in node]
        name = config.class_name(node)
        if not isinstance(node, str | dict) or name not in _RESUMABLE:
            return node
        arguments = (node.get("init_args") or {}) if isinstance(node, dict) else {}
        if name != "MLFlowLogger" and (placed or "save_dir" in arguments):
            return node
        path = f"srlora_pl.reporting.Resumable{name}"
        return path if isinstance(node, str) else {**node, "class_path": path}

    words = []
    for before, word in zip(("", *options), options, strict=False):
        name, equals, value = word.rpartition("=")
        if before in _OPTIONS or name in _OPTIONS:
            with contextlib.suppress(yaml.YAMLError):  # which the parser will tell
                found = ours(given := yaml_text.value(value))
                text = found if isinstance(found, str) else json.dumps(found)
                word = word if found == given else f"{name}{equals}{text}"
        words.append(word)
    trainer = settings.get("trainer") or {}
    if "logger" in trainer:
        settings = {**settings, "trainer": {**trainer, "logger": ours(trainer["logger"])}}
    return settings, words


def of_run(given: Any, folder: Path | None) -> list[Logger] | bool:
    """The loggers of a run for ``given``, the setting ``trainer.logger``.

    Args:
        folder: of the run; None where there is none, so that only those with a place of their own can log.
    """
    users = [] if given in (None, True, False) else list(given) if isinstance(given, list | tuple) else [given]
    if folder is None:
        return [each for each in users if not _has_no_place(each)] or False
    if given in (None, True):
        users = [ResumableTensorBoardLogger()]
    known = json.loads((folder / _IDS).read_text()) if (folder / _IDS).is_file() else {}
    for each in users:
        if (name := type(each).__name__) in known and not internals.run_id(each):
            internals.set_run_id(each, known[name])
    users = [each for each in users if not (isinstance(each, ResumableCSVLogger) and _has_no_place(each))]
    return [*(each.placed(folder) if _has_no_place(each) else each for each in users), ResumableCSVLogger(folder)]


def _has_no_place(logger: Logger) -> bool:
    return isinstance(logger, ResumableCSVLogger | ResumableTensorBoardLogger) and not logger.save_dir


class RememberIds(Callback):
    """Writes down the ids of the run at W&B and MLflow, so that a resumed one goes on there under the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            ids = {type(logger).__name__: internals.run_id(logger) for logger in trainer.loggers}
            if ids := {name: id for name, id in ids.items() if id}:
                write_whole(self.folder / _IDS, json.dumps(ids))
