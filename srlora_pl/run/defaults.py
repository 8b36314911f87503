"""The callbacks that every fit has unless the user's do the same, and which of Lightning's cannot be part of one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    SpikeDetection,
    StochasticWeightAveraging,
)

from srlora_pl.training import lightning_internals as internals
from srlora_pl.util.errors import UserError
from srlora_pl.util.files import replacing

# What a fit with them reported would not be what its files give, or it would end in an error of theirs.
_REFUSED: dict[type, str] = {
    BackboneFinetuning: "frees a layer named backbone, which no model here has: name layers in "
    "model.method.target_modules",
    BaseFinetuning: "says nothing of what to free: name a subclass that does",
    ModelPruning: "changes weights after validation has scored them and before they are saved: prune what "
    "export --format merged writes",
    OnExceptionCheckpoint: "makes the next fit go on from its file though nobody asks for it: use ModelCheckpoint with "
    "save_on_exception: true",
    SpikeDetection: "cannot read its own state from a checkpoint, so that nothing can be tested or resumed: use "
    "EarlyStopping with check_finite: true",
    StochasticWeightAveraging: "keeps its averages in no checkpoint, and no score is of them: use WeightAveraging",
}


def refuse_unfit(callbacks: Sequence[Callback]) -> None:
    """Refuse those of Lightning's callbacks that a fit cannot have.

    Raises:
        UserError: names the first, and what to use instead.
    """
    for callback in callbacks:
        for kind, why in _REFUSED.items():
            # A subclass may know better what to free.
            if type(callback) is kind or (isinstance(callback, kind) and not issubclass(kind, BaseFinetuning)):
                raise UserError(f"the callback {type(callback).__name__} {why}, or leave it out")


def best(folder: Path) -> ModelCheckpoint:
    """Keeps the file of the lowest validation loss."""
    return ModelCheckpoint(
        folder / "checkpoints",
        filename="best-step{step}",
        auto_insert_metric_name=False,
        monitor="val/loss",
        mode="min",
        enable_version_counter=False,  # what a resumed run writes once more takes the old one's place
    )


def chooses_best(callbacks: Sequence[Callback]) -> bool:
    """Whether the user brings a ModelCheckpoint that chooses by a score, which then takes the place of ours."""
    return any(isinstance(callback, ModelCheckpoint) and callback.monitor for callback in callbacks)


def keeps_last(callbacks: Sequence[Callback]) -> bool:
    """Whether the user brings a ModelCheckpoint whose ``last.ckpt`` is in the run's folder and can be gone on from."""
    kinds = [each for each in callbacks if isinstance(each, ModelCheckpoint)]
    return any(each.save_last and not each.save_weights_only and each.dirpath is None for each in kinds)


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


class KeepSettings(Callback):
    """Writes a run's ``config.yaml``, once nothing can refuse the settings any more."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            with replacing(self.path) as file:
                file.write(self.text.encode())
