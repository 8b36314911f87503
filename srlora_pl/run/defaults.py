"""The callbacks and plugins that a run has unless the user's do the same."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    ProgressBar,
    SpikeDetection,
    StochasticWeightAveraging,
)

from srlora_pl.reporting import (
    GLUEWriter,
    MatrixTable,
    Monitor,
    PredictionWriter,
    bar_or_lines,
)
from srlora_pl.reporting.events import log_text
from srlora_pl.run.folders import folder_of
from srlora_pl.training import lightning_internals as internals
from srlora_pl.training.checkpoints import AtomicCheckpointIO
from srlora_pl.util.errors import UserError
from srlora_pl.util.files import replacing

# With these the scores of a fit would not be those of its files, or a later command would fail.
_REFUSED: dict[type, str] = {
    BackboneFinetuning: "frees a layer named backbone, which no model here has: name layers in "
    "model.method.target_modules",
    BaseFinetuning: "does not say which layers to free: name a subclass that does",
    ModelPruning: "changes weights after validation has scored them and before they are saved: prune the weights of "
    "export --format merged",
    OnExceptionCheckpoint: "makes the next fit go on from its file though nobody asks for it: use ModelCheckpoint with "
    "save_on_exception: true",
    SpikeDetection: "cannot read its own state from a checkpoint, so that nothing can be tested or resumed: use "
    "EarlyStopping with check_finite: true",
    StochasticWeightAveraging: "keeps its averages in no checkpoint, and no score is of them: use WeightAveraging",
}


def refuse_unfit(callbacks: Sequence[Callback]) -> None:
    """Refuse the callbacks of Lightning that a fit cannot have, and say what to use instead."""
    for callback in callbacks:
        for kind, why in _REFUSED.items():
            # A subclass may know better which layers to free.
            if type(callback) is kind or (isinstance(callback, kind) and not issubclass(kind, BaseFinetuning)):
                raise UserError(f"the callback {type(callback).__name__} {why}, or leave it out")


def with_defaults(
    ours: Sequence[Callback], users: Sequence[Callback], settings: Any, folder: Path | None, fits: bool
) -> list[Callback]:
    """All callbacks of a run: ``ours`` first, and each of the user's in the place of the default that does the same.

    Args:
        settings: of the trainer.
        folder: of the run; None where it writes none.
        fits: whether it trains.
    """
    saves = folder if settings.enable_checkpointing is not False else None
    callbacks = [*ours]
    if saves and not any(isinstance(each, ModelCheckpoint) and each.monitor for each in users):
        callbacks.append(_best(saves))
    if folder and not has(users, LearningRateMonitor):
        callbacks.append(LearningRateMonitor("step"))
    if folder and not has(users, Monitor):
        callbacks.append(Monitor())
    if fits and settings.enable_model_summary is not False and not has(users, ModelSummary):
        callbacks.append(MatrixTable())
    if settings.enable_progress_bar is not False and not has(users, ProgressBar):
        callbacks.append(bar_or_lines())
    callbacks += users
    saves_last = _saves_last(users)
    for each in users:
        if saves and isinstance(each, ModelCheckpoint) and each.dirpath is None:
            each.dirpath = str(saves / "checkpoints")  # and not where the first logger writes
    if saves and not saves_last:  # after the others, so that it knows what they have saved
        place = max((i for i, each in enumerate(callbacks, 1) if isinstance(each, ModelCheckpoint)), default=0)
        callbacks.insert(place, Last(saves))
    return callbacks


def plugins(settings: Any) -> list[Any]:
    """The user's plugins, and our way of writing a checkpoint unless theirs has another."""
    users = as_list(settings.plugins)
    theirs = [*users, internals.checkpoint_io(settings.strategy)]
    return users if has(theirs, CheckpointIO) else [*users, AtomicCheckpointIO()]


def prediction_writer(checkpoint: Path, output: str | None, is_glue: bool) -> PredictionWriter:
    """The writer of ``output``, by default in the folder of the run that wrote ``checkpoint``."""
    if not is_glue:
        return PredictionWriter(prediction_file(checkpoint, output, "predictions.csv"))
    folder = Path(output or folder_of(checkpoint) or checkpoint.parent)
    if output and folder.suffix:
        raise UserError(f"--output {folder} must be a folder, as GLUE gives its files their names")
    _require_writable(folder)
    return GLUEWriter(folder)


def prediction_file(checkpoint: Path, output: str | None, name: str) -> Path:
    """``output``, by default ``name`` in the folder of the run that wrote ``checkpoint``."""
    file = Path(output or (folder_of(checkpoint) or checkpoint.parent) / name)
    if file.is_dir():
        raise UserError(f"--output {file} is a folder, name a file in it, such as {file / name}")
    _require_writable(file.parent)
    return file


def require_not_read(output: Path, data: Mapping[str, Any]) -> None:
    """Refuse to write predictions over a file that the settings ``data`` name, or that lies in a folder of theirs."""
    output = output.expanduser().resolve()
    for key in ("root", "test_root", "predict_root"):
        place = Path(str(data.get(key))).expanduser().resolve()
        if data.get(key) and output.exists() and (output == place or (place.is_dir() and place in output.parents)):
            raise UserError(f"--output {output} is a file of data.{key}, which would be gone: name another one")


def _require_writable(folder: Path) -> None:
    """Refuse a place that cannot be written to here, and not after an hour of predicting."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"predictions cannot be written into {folder}, name another place with --output")


def has(objects: Sequence[Any], kind: type) -> bool:
    """Whether one of ``objects`` is of ``kind``."""
    return any(isinstance(each, kind) for each in objects)


def as_list(value: Any) -> list[Any]:
    """A setting that holds none, one or several objects."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _best(folder: Path) -> ModelCheckpoint:
    """The checkpoint of the lowest validation loss."""
    return ModelCheckpoint(
        folder / "checkpoints",
        filename="best-step{step}",
        auto_insert_metric_name=False,
        monitor="val/loss",
        mode="min",
        enable_version_counter=False,  # a file that a resumed run writes again takes the old one's place
    )


def _saves_last(callbacks: Sequence[Callback]) -> bool:
    """Whether a ModelCheckpoint of the user writes a ``last.ckpt`` into the run's folder that a run can resume from."""
    kinds = [each for each in callbacks if isinstance(each, ModelCheckpoint) and each.dirpath is None]
    return any(each.save_last and not each.save_weights_only for each in kinds)


class Last(ModelCheckpoint):
    """last.ckpt, renewed at every validation and with the last step of an epoch and of the run.

    Lightning's own (``save_last``) is renewed only together with a new best one, which may be days ago.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "checkpoints", filename="last", enable_version_counter=False)

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        super().on_train_batch_end(trainer, *rest)
        if internals.is_last_batch(trainer):
            internals.save_for_now(self, trainer)


class WriteSettings(Callback):
    """Writes a run's ``config.yaml`` when training starts, as nothing can refuse the settings any more.

    The loggers that can hold text get it too.
    """

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            with replacing(self.path) as file:
                file.write(self.text.encode())
            for logger in trainer.loggers:
                log_text(logger, "config", f"```yaml\n{self.text}```", internals.logged_step(trainer))
