"""What a task refuses: arguments out of range, scores that no run has, batches and losses that cannot be right."""

import re
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from srlora_pl.data.protocols import Batch
from srlora_pl.lowrank.importance import all_finite
from srlora_pl.models.family import Classifier, in_evaluation
from srlora_pl.util.errors import UserError, did_you_mean, one_line


def require_known_scores(callbacks: Sequence[Any], known: Sequence[str], validates: bool) -> None:
    """Refuse a callback that monitors a score which the run does not have.

    Lightning looks for it when it is first needed, which may be after hours. Loaders without a name are numbered.

    Args:
        callbacks: Lightning's and the package's own.
        known: the scores of the run.
        validates: whether there are any of a validation.
    """
    for callback in callbacks:
        score = getattr(callback, "monitor", None)
        if score is not None and re.sub(r"^val_\d+/", "val/", score) not in known:
            raise UserError(
                f"The callback {type(callback).__name__} monitors {score!r}{did_you_mean(score, known)}, but this run "
                f"scores {', '.join(known)}."
            )
        if isinstance(callback, EarlyStopping) and str(score).startswith("val") and not validates:
            raise UserError(
                f"The callback {type(callback).__name__} monitors {score!r}, but this run has no validation: set "
                "data.val_fraction above 0, or monitor train/loss."
            )


def is_tuning(trainer: L.Trainer) -> bool:
    """Whether Lightning's learning-rate or batch-size finder is at work, which may diverge on purpose."""
    return isinstance(trainer.logger, DummyLogger) and not trainer.fast_dev_run  # type: ignore[attr-defined]


class FiniteLoss:
    """Finds a NaN or infinite training loss, and waits for the device only when it is asked.

    Args:
        step: optimizer steps done.
        device: of the losses.
    """

    def __init__(self, step: int = 0, device: torch.device | None = None) -> None:
        self.step = step
        self._non_finite = torch.zeros((), dtype=torch.bool, device=device)

    def add(self, loss: Tensor) -> None:
        """Note the loss of a micro-batch, a scalar."""
        self._non_finite = self._non_finite | ~torch.isfinite(loss.detach())

    def require(self, trainer: L.Trainer) -> None:
        """Refuse a loss since the last call that was not finite, in any process.

        Raises:
            UserError: there was one, and no tuner is at work.
        """
        first, last = self.step + 1, max(trainer.global_step, self.step + 1)
        self.step = trainer.global_step
        bad = trainer.strategy.reduce_boolean_decision(bool(self._non_finite), all=False)
        if bad and not is_tuning(trainer):
            raise UserError(
                f"The training loss became NaN or infinite in steps {first} to {last}: start anew with a lower "
                "model.lr or more model.warmup_steps, or go on from the last checkpoint, if there is one it is good, "
                "with another trainer.precision (bf16-mixed, 32-true) or trainer.gradient_clip_val."
            )


def require_autocast(task: Any) -> None:
    """Refuse frozen matrices in half precision beside layers in float32, where nothing brings their types together."""
    weights, precision = task.family.weights, str(task.trainer.precision)
    if isinstance(task.family, Classifier) and weights != "float32" and not precision.endswith("-mixed"):
        raise UserError(
            f"model.weights is {weights!r}, but in trainer.precision {precision!r} norms and the head compute in "
            "another type: set it to bf16-mixed."
        )


def require_finite_weights(task: L.LightningModule) -> None:
    """Refuse trained weights that are not finite, in any process: a step's loss may be finite and its gradients not."""
    trainer = task.trainer
    finite = bool(all_finite([p for p in task.parameters() if p.requires_grad]))
    if not trainer.strategy.reduce_boolean_decision(finite) and not is_tuning(trainer):
        raise UserError(
            f"The weights became NaN or infinite before step {trainer.global_step + 1}, though the loss was finite: "
            "start anew with a lower model.lr, or go on from the last checkpoint, if there is one it is good, with "
            "trainer.precision 32-true or 64-true."
        )


def require_that_a_batch_passes(task: Any, data: Any) -> None:
    """Compute the loss of two training samples without gradients, in evaluation mode.

    The run is as without it: random states, buffers, modes and the order of the data stay as they are, and nothing is
    compiled.

    Args:
        task: an `srlora_pl.tasks.base.Task` in a trainer, on its device.
        data: a LightningDataModule with `trial_batch`, set up for the fit.

    Raises:
        UserError: the network or the loss cannot take the batch, or the loss is not finite.
    """
    with isolate_rng(), torch.no_grad(), in_evaluation(task), torch.compiler.set_stance("force_eager"):
        batch = data.trial_batch()
        content = ", ".join(f"{key} {_short(value)}" for key, value in batch.items() if isinstance(value, Tensor))
        batch = on_device(task, data, batch)
        try:
            with task.trainer.precision_plugin.val_step_context():
                loss = task.call_as_step("trial_loss", batch)
        except UserError:
            raise
        except Exception as error:  # a network raises what it likes
            raise UserError(
                f"model.backbone {task.hparams['backbone']!r} cannot take a first batch of this data "
                f"({type(error).__name__}: {one_line(error)}), which holds {content}: choose another model.backbone, "
                "or change model.backbone_kwargs or the settings of the data."
            ) from error
        if not loss.isfinite():
            raise UserError(
                f"The loss of a first batch is {loss.item()} before any training: see to the weights "
                "of model.backbone, or set trainer.precision to 32-true."
            )


def on_device(task: L.LightningModule, data: L.LightningDataModule, batch: Batch) -> Batch:
    """``batch`` as Lightning would hand it to ``task``."""
    batch = task.trainer.precision_plugin.convert_input(batch)
    batch = data.on_before_batch_transfer(batch, 0)
    return data.on_after_batch_transfer(data.transfer_batch_to_device(batch, task.device, 0), 0)


def _short(value: Tensor) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
