"""Short runs of a method on a toy network."""

import copy
from typing import Self

import torch

from srlora_pl.lowrank import Adaptation
from tests.helpers.contract_program import batches, loss_of, sources_of
from tests.helpers.methods import made, trainer_of
from tests.helpers.toys import ToyNet

STEPS = 6


class ShortRun:
    """A method that trains, under autocast or without, and can go on from a file's content."""

    def __init__(self, kind: type, net: ToyNet, autocast: bool = True) -> None:
        self.net, self.W0 = net, copy.deepcopy(net.state_dict())
        self.autocast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        torch.manual_seed(3)
        method = made(kind, rank=4, alpha=8.0)
        self.adaptation = Adaptation(net, method, ["head"], pretrained=lambda: self.W0)
        self.optimizer = trainer_of(self.adaptation, torch.optim.AdamW, lr=0.02)
        with self.autocast():
            self.adaptation.start(sources_of(net, method, dtype=torch.float32))
        self.adaptation.plan(STEPS)

    def train(self, first: int = 1, last: int = STEPS) -> Self:
        self.losses: list[float] = []
        for step, batch in enumerate(batches(STEPS, torch.float32)[first - 1 : last], start=first):
            self.optimizer.zero_grad()
            with self.autocast():
                loss = loss_of(self.net, batch)
            loss.backward()
            self.losses.append(loss.item())
            self.adaptation.before_optimizer(step)
            self.optimizer.step()
            self.adaptation.after_optimizer(step, self.optimizer)
        return self
