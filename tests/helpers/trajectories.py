"""Trajectories of the methods on a toy network in a plain loop, equal on every machine up to rounding."""

import io
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srlora_pl.lowrank import Adaptation, LoRA, PiSSA, SRLoRA
from tests.helpers.paths import ROOT
from tests.helpers.toys import toy_net

FILE = ROOT / "tests/nets/trajectories.safetensors"
STEPS = 40
SNAPSHOTS = (9, 20, 29, 40)  # before a switch, where the averages are whole, and after one
# The loop is saved and made again here, before the switch that is due: at a switch step of every case, and between two.
STOPS = (10, 20, 33)
SHARED: dict[str, Any] = {"rank": 4, "alpha": 10.0}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


@dataclass
class Case:
    method: Any
    optimizer: str = "adamw"
    sizes: dict[str, int] = field(default_factory=dict)  # of the network


def srlora(**options: Any) -> SRLoRA:
    return SRLoRA(**SHARED | {"target_rank": 12} | options)


CASES = {
    "lora-sgd": Case(LoRA(**SHARED), "sgd"),
    "lora-adamw": Case(LoRA(**SHARED)),
    "pissa-sgd": Case(PiSSA(**SHARED), "sgd"),
    "pissa-adamw": Case(PiSSA(**SHARED)),
    "srlora-sgd": Case(srlora(), "sgd"),
    "srlora-adamw": Case(srlora()),
    "srlora-recycled-zero-sgd": Case(srlora(reset_scores="recycled", optimizer_state="zero"), "sgd"),
    "srlora-recycled-zero-adamw": Case(srlora(reset_scores="recycled", optimizer_state="zero")),
    "srlora-keep-adamw": Case(srlora(optimizer_state="keep", beta1=0.7, beta2=0.95)),
    "srlora-query-value": Case(srlora(target_modules=["query", "value"])),
    "srlora-rank-pattern": Case(srlora(rank_pattern={"fc1": 2})),
    "srlora-alpha-rslora": Case(srlora(alpha=6.0, alpha_pattern={"qkv": 3.0}, use_rslora=True)),
    # The fused pairs stay smaller than the weight, so that a compact state holds them to the end.
    "srlora-ledger": Case(srlora(rank=2, target_rank=6), sizes={"dim": 24, "hidden": 32, "depth": 1}),
}


def network(case: Case, dtype: torch.dtype) -> nn.Module:
    """With weights of NumPy's frozen generator, as torch may change its own."""
    random = np.random.RandomState(0)
    net = toy_net(**case.sizes)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(_normal(random, parameter.shape) / parameter.shape[-1] ** 0.5)
    return net.to(dtype)


def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    random = np.random.RandomState(1)
    return [(_normal(random, (8, 5)).to(dtype), torch.from_numpy(random.randint(3, size=8))) for _ in range(STEPS)]


def _normal(random: np.random.RandomState, shape: tuple[int, ...]) -> Tensor:
    # Coarse numbers are the same in fp32 as in fp64, and whatever the last bit of a machine's logarithm.
    return torch.from_numpy(random.standard_normal(shape).round(4))


class Loop:
    """A network, its adaptation and its optimizer, as a user without Lightning makes them."""

    def __init__(self, case: Case, dtype: torch.dtype, pretrained: bool) -> None:
        self.case, self.dtype, self.pretrained = case, dtype, pretrained
        again = (lambda: network(case, dtype).state_dict()) if pretrained else None
        self.net = network(case, dtype)
        self.adaptation = Adaptation(self.net, deepcopy(case.method), trainable=["head"], pretrained=again)
        if isinstance(case.method, LoRA):
            random = np.random.RandomState(2)
            with torch.no_grad():
                for name, parameter in self.net.named_parameters():
                    if name.endswith("lora_A"):
                        parameter.copy_(_normal(random, parameter.shape) / 4)
        self.adaptation.start()
        self.adaptation.plan(STEPS)
        self.optimizer = OPTIMIZERS[case.optimizer]([p for p in self.net.parameters() if p.requires_grad])

    def reloaded(self) -> "Loop":
        """This loop once more, from a compact state."""
        trained = {name: p.detach() for name, p in self.net.named_parameters() if p.requires_grad}
        file = io.BytesIO()
        torch.save((trained, self.adaptation.state_dict(compact=True), self.optimizer.state_dict()), file)
        file.seek(0)
        trained, adaptation, optimizer = torch.load(file, weights_only=True)
        other = Loop(self.case, self.dtype, self.pretrained)
        other.adaptation.load_state_dict(adaptation)
        other.net.load_state_dict(trained, strict=False)
        other.optimizer.load_state_dict(optimizer)
        return other

    def tensors(self) -> dict[str, Tensor]:
        """All that the trajectory consists of, by name."""
        return {name: value.clone() for name, value in {**self.net.state_dict(), **scores(self.adaptation)}.items()}


def run(case: Case, dtype: torch.dtype, compact: bool) -> list[dict[str, Tensor]]:
    """The tensors of the loop after each of `SNAPSHOTS`; with ``compact`` it is made again at each of `STOPS`."""
    loop, snapshots = Loop(case, dtype, pretrained=compact), []
    for step, (x, y) in enumerate(batches(dtype), start=1):
        before, after = hooks(loop.adaptation)
        loop.optimizer.zero_grad()
        nn.functional.cross_entropy(loop.net(x), y).backward()
        before(step)
        loop.optimizer.step()
        if compact and step in STOPS:
            loop = loop.reloaded()
            _, after = hooks(loop.adaptation)
        after(step, loop.optimizer)
        if step in SNAPSHOTS:
            snapshots.append(loop.tensors())
    return snapshots


def hooks(adaptation: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What a loop calls before and after the optimizer, by its name now or by that of version 0.1."""
    before = getattr(adaptation, "before_optimizer", None) or (lambda step: adaptation.observe())
    after = getattr(adaptation, "after_optimizer", None) or adaptation.switch_if_due
    return before, after


def scores(adaptation: Any) -> dict[str, Tensor]:
    """SRLoRA's running averages and the steps of its switches, wherever the state holds them; else nothing."""
    found: dict[str, list[Tensor]] = {"smoothed": [], "uncertainty": [], "intervals": []}

    def collect(state: Mapping[Any, Any]) -> None:
        for key, value in state.items():
            if key in found and isinstance(value, Tensor):
                found[key].append(value.flatten())
            elif key in found and isinstance(value, Mapping):
                found[key] += [each.flatten() for each in value.values()]
            elif isinstance(value, Mapping):
                collect(value)

    collect(adaptation.state_dict())
    return {f"scores.{key}": torch.cat(values) for key, values in found.items() if values} if found["smoothed"] else {}


def digest(tensor: Tensor) -> Tensor:
    """Norm of ``tensor`` and its product with a fixed vector, fp64 (2,)."""
    flat = tensor.detach().double().flatten()
    return torch.stack([flat.norm(), flat @ torch.arange(len(flat), dtype=torch.float64).cos()])
