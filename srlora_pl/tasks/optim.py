"""Optimizers and learning rates, and the checks of their arguments."""

import math
import sys
from typing import Any

import torch
from torch.optim import Optimizer

from srlora_pl.util.errors import UserError, did_you_mean

OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
SCHEDULES = ("cosine", "linear", "constant")


def require_length(schedule: str, warmup_steps: int, total: float) -> None:
    """Refuse a run of ``total`` optimizer steps that is too short for its warm-up, or endless with a schedule's end."""
    if schedule != "constant" and not math.isfinite(total):
        raise UserError(
            f"model.schedule {schedule!r} ends with the run, whose length is not known: set trainer.max_steps."
        )
    if warmup_steps > total:
        raise UserError(
            f"model.warmup_steps is {warmup_steps} but the run has {total} optimizer steps: lower it, or raise "
            "trainer.max_steps or trainer.max_epochs."
        )


def schedule_factor(schedule: str, step: int, total: float, warmup: int) -> float:
    """The factor of the learning rate in optimizer step ``step`` (from 0) of ``total``.

    Rises linearly from 0 over ``warmup`` steps, then follows ``schedule`` down to 0 at ``total`` or stays at 1.
    """
    if step < warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def optimizer_class(name: str) -> type[Optimizer]:
    """The class behind ``sgd``, ``adamw`` or a path such as ``torch.optim.NAdam``.

    Its module must be imported already: the name may come from a checkpoint, which must not make anything run.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    if isinstance(found, type) and issubclass(found, Optimizer):
        return found
    known = [*OPTIMIZERS, *(f"torch.optim.{n}" for n in dir(torch.optim) if n[0].isupper())]
    raise UserError(
        f"model.optimizer is {name!r}{did_you_mean(name, known)}: give 'sgd', 'adamw' or the path of a torch "
        "optimizer class such as 'torch.optim.NAdam', and from Python import its module first."
    )


def build_optimizer(
    name: str, groups: list[dict[str, Any]], lr: float, momentum: float, scaled_gradients: bool
) -> Optimizer:
    """The optimizer ``name`` over ``groups``; ``momentum`` is SGD's, the others keep their own defaults.

    On CUDA and ROCm the update runs as one fused kernel, but not when a gradient scaler is at work: a fused
    optimizer unscales by itself, so that everything before it would see scaled gradients, and torch 2.14's fused SGD
    begins with whatever lies in memory as its momentum where the first step overflows.
    """
    options: dict[str, Any] = {"momentum": momentum} if name == "sgd" else {}
    on_gpu = all(p.is_cuda for group in groups for p in group["params"])
    if name in OPTIMIZERS and on_gpu and not scaled_gradients:
        options["fused"] = True
    try:
        optimizer = optimizer_class(name)(groups, lr=lr, **options)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"model.optimizer {name!r} cannot be built from parameter groups and model.lr ({error}): choose "
            "another one, such as 'adamw'."
        ) from error
    if "weight_decay" not in optimizer.defaults and any(group["weight_decay"] for group in groups):
        raise UserError(f"model.optimizer {name!r} has no weight decay: set model.weight_decay to 0.")
    return optimizer
