"""What a task tries before it trains, so that a run ends at once if it cannot work."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from srlora_pl.data.base import DataModule
from srlora_pl.util.errors import UserError, one_line


def require_that_a_batch_passes(task: Any, data: DataModule) -> None:
    """Compute the loss of two training samples without gradients, in evaluation mode.

    The run is as without it: random states, buffers, modes and the order of the data stay as they are, and nothing is
    compiled.

    Args:
        task: an `srlora_pl.tasks.base.Task` in a trainer, on its device.
        data: set up for the fit.

    Raises:
        UserError: the network or the loss cannot take the batch, or the loss is not finite.
    """
    with isolate_rng(), torch.no_grad(), in_evaluation(task), torch.compiler.set_stance("force_eager"):
        batch = data.trial_batch()
        what = ", ".join(f"{key} {_short(value)}" for key, value in batch.items() if isinstance(value, Tensor))
        batch = task.trainer.precision_plugin.convert_input(batch)
        batch = data.on_before_batch_transfer(batch, 0)
        batch = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, task.device, 0), 0)
        try:
            with task.trainer.precision_plugin.val_step_context():
                loss = task.losses(task.logits(batch), batch["label"])
        except UserError:
            raise
        except Exception as error:  # a network raises what it likes
            raise UserError(
                f"model.backbone {task.hparams['backbone']!r} cannot take a first batch of this data "
                f"({type(error).__name__}: {one_line(error)}), which holds {what}: choose another model.backbone, or "
                "change model.backbone_kwargs or the settings of the data."
            ) from error
        if not loss.isfinite().all():
            raise UserError(
                f"The loss of a first batch is {loss.float().mean().item()} before any training: see to the weights "
                "of model.backbone, or set trainer.precision to 32-true."
            )


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """``module`` in evaluation mode; after it, modes and buffers are what they were, also those of a count of calls."""
    modes = [(each, each.training) for each in module.modules()]
    buffers = [
        (each, name, buffer, buffer.clone())
        for each in module.modules()
        for name, buffer in each.named_buffers(recurse=False)
    ]
    module.eval()
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training
        for each, name, buffer, value in buffers:
            setattr(each, name, buffer.copy_(value))


def _short(value: Tensor) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
