"""The restarts of ReLoRA: at intervals fuse all pairs, draw them anew, and have the optimizer forget them."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srlora_pl.lowrank.checks import require_trained
from srlora_pl.lowrank.linear import Matrix
from srlora_pl.lowrank.method import AdaptedNetwork, Controller, Progress, generator_for
from srlora_pl.lowrank.optimizer_state import prune, require_recyclable
from srlora_pl.lowrank.schedule import Pace, Schedule
from srlora_pl.util.errors import UserError
from srlora_pl.util.precision import full_precision


class Settings(Protocol):
    """The settings of `ReLoRA` that restarts depend on."""

    restarts: int
    optimizer_state: Any
    pruned: float

    def schedule(self, last_step: int) -> Schedule:
        """The restarts of a run."""


class Restarting(Controller):
    """The restarts of one network.

    Attributes:
        pace: the restarts of this run; None before `plan`.
        done: restarts in all runs.
    """

    needs_length = True
    events = "restarts"

    def __init__(self, method: Settings, adaptation: AdaptedNetwork) -> None:
        super().__init__(adaptation)
        self.method = method
        self.pace: Pace | None = None
        self.done = 0

    def require_room(self, steps: int) -> None:
        if self.method.restarts >= steps:
            raise UserError(
                f"method.restarts is {self.method.restarts}, and the run has {steps} optimizer steps: lower the one, "
                "or raise trainer.max_steps"
            )

    def plan(self, first_step: int, last_step: int, strict: bool) -> str:
        """Spread the restarts over the whole run; where its length has changed, those that lie behind count as done."""
        begun = self.pace if first_step > 0 else None
        if begun and begun.schedule.last_step == last_step:
            return ""
        if strict:
            self.require_room(last_step)
        schedule = self.method.schedule(last_step)
        self.pace = Pace(schedule, schedule.due(first_step))
        if begun:
            warnings.warn(
                f"the run now ends at step {last_step}: its restarts are spread anew, {self.pace.missing} are to come",
                stacklevel=3,
            )
        too_short = self.method.restarts and not schedule.planned
        return f"No restart falls into these {last_step} optimizer steps." if too_short else ""

    def after_optimizer(self, step: int, optimizer: Optimizer | None) -> bool:
        """Do the restart that is due; one that a stopped run missed is made up for."""
        if self.pace is None:
            raise UserError("no restart is planned, call plan() before training")
        if optimizer is not None and step == 1 and self.pace.missing and self.method.optimizer_state != "keep":
            adapters = (layer.adapter_parameters() for layer in self.adaptation.layers.values())
            require_recyclable(optimizer, (parameter for layer in adapters for parameter in layer))
        due = self.pace.schedule.due(step)
        if due <= self.pace.done:
            return False
        self._restart(generator_for(f"restart {self.done}", self.adaptation.seed), optimizer)
        self.done += due - self.pace.done
        self.pace = Pace(self.pace.schedule, due)
        return True

    @full_precision()
    def _restart(self, generator: torch.Generator, optimizer: Optimizer | None) -> None:
        if optimizer is not None:
            require_trained(self.adaptation.layers, optimizer)
        for matrix in self.adaptation.matrices:
            self.adaptation.add(matrix, matrix.B, matrix.A, matrix.scaling)
            drawn = torch.empty(matrix.A.shape, dtype=matrix.A.dtype)  # on the CPU, whose numbers are everybody's
            matrix.A.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))
            matrix.B.zero_()
            if optimizer is not None and self.method.optimizer_state != "keep":
                self._prune(matrix, generator, optimizer)

    def _prune(self, matrix: Matrix, generator: torch.Generator, optimizer: Optimizer) -> None:
        def forgotten(moment: Tensor) -> Tensor:
            if self.method.optimizer_state == "zero":
                return torch.ones_like(moment, dtype=torch.bool)
            if self.method.optimizer_state == "random":
                return (torch.rand(moment.shape, generator=generator) < self.method.pruned).to(moment.device)
            magnitudes = moment.abs()
            return magnitudes <= magnitudes.flatten().kthvalue(max(round(self.method.pruned * moment.numel()), 1))[0]

        for parameter in matrix.layer.adapter_parameters():
            prune(optimizer, parameter, matrix.of, forgotten)

    def progress(self) -> Progress:
        missing, coming = (self.pace.missing, self.pace.next_step) if self.pace else (0, None)
        return Progress(self.done, self.done + missing, coming)

    def metrics(self, step: int) -> Mapping[str, float]:
        due = self.pace.schedule.due(step) - self.pace.done if self.pace else 0
        return {**super().metrics(step), "restarts": float(self.done + max(due, 0))}

    def state_dict(self) -> dict[str, Any]:
        return {"pace": self.pace and self.pace.state(), "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pace = state["pace"] and Pace.of_state(state["pace"])
        self.done = state["done"]
