"""One optimizer step of a task, measured on shapes."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from srlora_pl.models import causal
from srlora_pl.models.token_loss import summed_loss
from srlora_pl.planning.shapes import Shapes
from srlora_pl.tasks.base import Task
from srlora_pl.tasks.optim import build_optimizer
from srlora_pl.util.errors import UserError, one_line


@dataclass(frozen=True)
class Step:
    """What a step needs, in bytes unless said otherwise, and its work.

    Attributes:
        gradients: of all that trains.
        optimizer: its states.
        method: what the method keeps besides, such as running averages.
        activations: what waits for the backward pass of one micro-batch.
        working: the most that there is at one time beside all these and the weights.
        logits: the most that the loss takes beside what it leaves; part of ``working``.
        tokens: of a micro-batch, or pictures.
        forward: floating-point operations of the forward pass of a micro-batch.
        backward: of the backward pass, with what it computes again.
    """

    gradients: int
    optimizer: int
    method: int
    activations: int
    working: int
    logits: int
    tokens: int
    forward: int
    backward: int


def batch_for(task: Task, size: int, length: int) -> dict[str, Tensor]:
    """A micro-batch of ``size`` samples for ``task``; texts have ``length`` tokens, all of them answers."""
    (example, *_) = task.family.example_inputs(task.net)
    if "input_ids" not in example:
        return {name: torch.zeros(size, *each.shape[1:]) for name, each in example.items()} | _labels(task, size)
    ids = example["input_ids"]
    ids = ids[:1, :1].expand(size, length).clone()
    ids[:, -1] = example["input_ids"][0, -1]  # where some networks look for the end of a text
    made = {"input_ids": ids, "labels": ids}
    return made if task.generates else {**made, "attention_mask": torch.ones_like(ids), **_labels(task, size)}


def _labels(task: Any, size: int) -> dict[str, Tensor]:
    kind = getattr(task, "problem", "single_label")
    shape = (size, task.num_classes) if kind == "multi_label" else (size,)
    return {"label": torch.zeros(shape, dtype=torch.int64 if kind == "single_label" else torch.float32)}


def measure(task: Task, batch: dict[str, Tensor], precision: str) -> Step:
    """Take an optimizer step of ``task``, which is on the meta device, as a later step of a run is: with the gradients
    and the states of the step before it.

    Args:
        precision: of the trainer.

    Raises:
        UserError: the network needs the values of its weights.
    """
    try:
        return _measure(task, batch, precision)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"model.backbone {task.hparams['backbone']!r} cannot be planned for, as it needs the values of its weights "
            f"to compute ({one_line(error)}): try a step with --trainer.fast_dev_run true"
        ) from error


def _measure(task: Task, batch: dict[str, Tensor], precision: str) -> Step:
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else None
    adaptation = task.adaptation
    adaptation.started = True
    state = [each for each in tree_leaves(adaptation.controller.state_dict()) if isinstance(each, Tensor)]
    with Shapes() as shapes:
        if "64" in precision:
            task.double()
        shapes.take(task)
        trained = [each for each in task.parameters() if each.requires_grad]
        own = shapes.live
        for each in trained:
            each.grad = torch.zeros_like(each)
        gradients = shapes.live - own
        optimizer = optimizer_of(task)
        optimizer.step()
        states = shapes.live - own - gradients
        shapes.peak = before = shapes.live
        with torch.autocast("cpu", dtype) if dtype else nullcontext():
            loss = task.training_loss(batch)
        activations, forward = shapes.live - before, shapes.flops.total()
        optimizer.zero_grad()
        loss.backward()
        del loss
        peak, backward = shapes.peak, shapes.flops.total() - forward
        shapes.peak = after = shapes.live
        adaptation.before_optimizer(1)
        grown = shapes.live - after
        optimizer.step()
        working = max(peak - before - activations, shapes.peak - after - grown - activations)
        logits = _logits(task, dtype, shapes) if task.generates else 0
    tokens = batch["input_ids"].numel() if "input_ids" in batch else len(next(iter(batch.values())))
    method = sum(each.numel() * each.element_size() for each in state)
    return Step(gradients, states, method, activations, working, logits, tokens, forward, backward)


def _logits(task: Any, dtype: torch.dtype | None, shapes: Shapes) -> int:
    """The most that the loss of the tokens takes beside the gradient that it leaves."""
    head = causal.head(task.net)
    rows = task.loss_chunk
    hidden = torch.empty_like(head.weight[:1], dtype=dtype or head.weight.dtype).expand(rows, -1).contiguous()
    shapes.peak = shapes.live
    before = shapes.live
    with torch.autocast("cpu", dtype) if dtype else nullcontext():
        summed_loss(hidden.requires_grad_(), torch.zeros(rows, dtype=torch.int64), head, rows)
    return shapes.peak - before


def optimizer_of(task: Task) -> Any:
    """The optimizer of a run of ``task``, outside of a Trainer."""
    groups = task.adaptation.param_groups(task.lr, task.weight_decay, task.head_lr, task.parameters())
    own = task.adaptation.method.optimizer(task.adaptation, groups, task.optimizer, task.momentum)
    return own or build_optimizer(task.optimizer, groups, task.lr, task.momentum, scaled_gradients=False)
