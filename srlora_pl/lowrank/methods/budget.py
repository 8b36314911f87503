"""The budget of AdaLoRA: score every triplet in every step, and at intervals take E from the lowest of the network."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srlora_pl.lowrank.importance import Importance, all_finite
from srlora_pl.lowrank.linear import Adapter
from srlora_pl.lowrank.method import AdaptedNetwork, Controller
from srlora_pl.util.errors import UserError


class Settings(Protocol):
    """The settings of `AdaLoRA` that the budget depends on."""

    initial_share: float
    final_share: float
    interval_share: float
    beta1: float
    beta2: float
    orthogonality: float

    def target_of(self, layer: str) -> int:
        """The layer's share of the final budget."""


class Budget(Controller):
    """The scores of all triplets of one network, and which of them may act.

    Layers of the same shapes lie together, so that each operation is one kernel for all of them.

    Attributes:
        groups: the layers by the shapes of their parameters.
        kept: 1 for every triplet that the last choice left, 0 for the others, in the order of ``groups``.
        last_step: of the plan; 0 before it.
        done: the last step that is over.
        settled: whether the final choice is made.
    """

    needs_length = True

    def __init__(self, method: Settings, adaptation: AdaptedNetwork) -> None:
        super().__init__(adaptation)
        self.method = method
        groups: dict[Any, list[Any]] = defaultdict(list)
        for layer in adaptation.layers.values():
            groups[tuple(p.shape for p in layer.adapter_parameters())].append(layer)
        self.groups = [*groups.values()]
        layers = [layer for group in self.groups for layer in group]
        self.importance = Importance(layers, method.beta1, method.beta2)
        self.first = sum(matrix.rank for matrix in adaptation.matrices)
        self.final = sum(method.target_of(matrix.layer_name) for matrix in adaptation.matrices)
        self.kept = torch.ones(self.first)
        # This step's gradients, until it is over; 0 where it is to leave no trace.
        self._gradient = torch.zeros_like(self.importance.smoothed)
        self.last_step, self.done, self.settled = 0, 0, False

    def plan(self, first_step: int, last_step: int, strict: bool) -> str:
        if first_step == 0 or last_step != self.last_step:
            # A step whose file was written before its end is still to be scored.
            self.last_step, self.done, self.settled = last_step, min(self.done, first_step), False
        return ""

    @property
    def _fall(self) -> tuple[int, int]:
        """The last step before the budget falls, and the first one at which it is reached."""
        total, method = self.last_step, self.method
        return round(method.initial_share * total), total - round(method.final_share * total)

    def budget(self, step: int) -> int:
        """How many triplets of the network may act once ``step`` is over."""
        begin, end = self._fall
        if step <= begin < end:
            return self.first
        left = max(1 - (step - begin) / (end - begin), 0.0) if begin < end else 0.0
        return int((self.first - self.final) * left**3 + self.final)

    def _chooses(self, step: int) -> bool:
        begin, end = self._fall
        interval = max(round(self.method.interval_share * self.last_step), 1)
        return begin < step < end and step % interval == 0

    # --- in every step

    @torch.no_grad()
    def before_optimizer(self, step: int, gradients: Sequence[Tensor], inverse_scale: Tensor | None) -> None:
        parameters = self.importance.parameters
        if all(p.grad is None for p in parameters):
            return  # a step that was left out
        self._pull_towards_orthonormal(inverse_scale)
        if step >= self._fall[1]:
            return
        own = {id(p.grad) for p in parameters}
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        finite = all_finite([each for each in gradients if id(each) not in own]) & flat.isfinite().all()
        if inverse_scale is not None:
            flat *= inverse_scale
        self._gradient = flat.masked_fill_(~finite, 0)

    def _pull_towards_orthonormal(self, inverse_scale: Tensor | None) -> None:
        """Add the gradient of weight / 2M times the sum of ||A A^T - I|| and ||B^T B - I|| (Frobenius norms)."""
        weight = self.method.orthogonality / len(self.adaptation.matrices)
        if weight == 0:
            return
        for group in self.groups:
            A, B = torch.stack([each.lora_A for each in group]), torch.stack([each.lora_B for each in group])
            for name, pull in (("lora_A", _pull(A)), ("lora_B", _pull(B.mT).mT)):
                pull = weight * pull if inverse_scale is None else (weight / inverse_scale) * pull
                grads = [(getattr(layer, name).grad, own) for layer, own in zip(group, pull.unbind(), strict=True)]
                there = [(grad, own) for grad, own in grads if grad is not None]
                torch._foreach_add_([grad for grad, _ in there], [own for _, own in there])

    @torch.no_grad()
    def after_optimizer(self, step: int, optimizer: Optimizer | None) -> bool:
        """Score the updated triplets with the step's gradients; choose where it is time to; hold the last choice."""
        if not self.last_step:
            raise UserError("no budget is planned, call plan() before training")
        if step <= self.done:
            return False
        self.done, end = step, self._fall[1]
        if step >= end:
            chosen = not self.settled
            if chosen:
                self.kept, self.settled = self._choice(self.final), True
            self._mask(self.kept)
            return chosen
        active = self._gradient.any()
        weights: list[Tensor] = [p.flatten() for p in self.importance.parameters]
        self.importance.average((torch.cat(weights) * self._gradient).abs_(), active)
        self._gradient = torch.zeros_like(self._gradient)
        if not self._chooses(step):
            return False
        kept = self._choice(self.budget(step))
        self.kept = torch.where(active, kept, self.kept.to(kept))
        self._mask(torch.where(active, kept, 1))
        return True

    def _choice(self, budget: int) -> Tensor:
        """1 for the ``budget`` highest of all triplets, 0 for the others; one process decides for all."""

        def choose() -> Tensor:
            scores = torch.cat([each.flatten() for each in self._triplet_scores()])
            if budget >= len(scores):
                return torch.ones_like(scores)
            return (scores > scores.kthvalue(len(scores) - budget).values).to(scores)

        return self.adaptation.run_on_rank_zero(choose).to(self.importance.smoothed)

    def _mask(self, kept: Tensor) -> None:
        E = [layer.lora_E.detach() for group in self.groups for layer in group]
        parts = kept.to(E[0]).split([each.numel() for each in E])
        torch._foreach_mul_(E, [part.view_as(each) for part, each in zip(parts, E, strict=True)])

    def _triplet_scores(self) -> Iterator[Tensor]:
        """The score of each triplet, (layers, ..., r) by group: S_E and the means of S_A and S_B."""
        flat = self.importance.smoothed * self.importance.uncertainty
        sizes = [len(group) * sum(p.numel() for p in group[0].adapter_parameters()) for group in self.groups]
        for group, part in zip(self.groups, flat.split(sizes), strict=True):
            parameters: list[nn.Parameter] = group[0].adapter_parameters()
            columns = part.view(len(group), -1).split([p.numel() for p in parameters], 1)
            A, B, E = (each.unflatten(1, p.shape) for each, p in zip(columns, parameters, strict=True))
            of_pairs = A.mean(-1) + B.mean(-2)
            yield E.view_as(of_pairs) + of_pairs

    # --- what others look at

    def scores(self) -> Mapping[str, Tensor]:
        by_layer: dict[Adapter, Tensor] = {}
        for group, scores in zip(self.groups, self._triplet_scores(), strict=True):
            by_layer |= dict(zip(group, scores, strict=True))
        return {matrix.name: matrix.of(by_layer[matrix.layer]) for matrix in self.adaptation.matrices}

    def metrics(self, step: int) -> Mapping[str, float]:
        return {**super().metrics(step), "budget": float(self.budget(step))}

    def state_dict(self) -> dict[str, Any]:
        tensors = {"gradient": self._gradient.clone(), "kept": self.kept.clone()}
        counts = {"last_step": self.last_step, "done": self.done, "settled": self.settled}
        return {**self.importance.state_dict(), **tensors, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.importance.load_state_dict(state)
        device = self.importance.smoothed.device
        self._gradient, self.kept = (state[key].to(device, copy=True) for key in ("gradient", "kept"))
        self.last_step, self.done, self.settled = state["last_step"], state["done"], state["settled"]


def _pull(A: Tensor) -> Tensor:
    """The gradient of ||A A^T - I|| / 2 with respect to A, (..., r, in)."""
    excess = A @ A.mT - torch.eye(A.shape[-2], dtype=A.dtype, device=A.device)
    return (excess / torch.linalg.matrix_norm(excess)[..., None, None].clamp(min=1e-12)) @ A
