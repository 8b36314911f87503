"""DyLoRA (Valipour et al. 2022, arXiv 2210.07558)."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from srlora_pl.lowrank.linear import LowRankLinear, Matrix
from srlora_pl.lowrank.method import AdaptedNetwork, Controller, Method, kaiming_uniform
from srlora_pl.util.errors import UserError


class NestedLinear(LowRankLinear):
    """LoRA's layer whose first b pairs are a model of their own, of strength s(b).

    Attributes:
        gate: (r,), s(b) / s of the first b pairs and 0 of the others, in a training step. Values, not a shape, so that
            nothing is compiled again for another b.
    """

    gate: Tensor

    def build(
        self, p: tuple[int, ...], out: int, in_: int, evaluation_rank: int | None = None, use_rslora: bool = False
    ) -> None:
        super().build(p, out, in_)
        self.evaluation_rank, self._power = evaluation_rank, 0.5 if use_rslora else 1.0

    def open_gate(self, pairs: int) -> None:
        """Train with the first ``pairs`` pairs."""
        self.gate = self._strength(pairs) * (torch.arange(self.rank, device=self.lora_A.device) < pairs).to(self.lora_A)

    def _strength(self, pairs: int) -> float:
        """s(b) / s."""
        return (self.rank / pairs) ** self._power

    def training_factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_B, self.gate.to(self.lora_A)[:, None] * self.lora_A

    def factors(self) -> tuple[Tensor, Tensor]:
        pairs = self.evaluation_rank or self.rank
        return self.lora_B[..., :pairs], self._strength(pairs) * self.lora_A[..., :pairs, :]


class DrawnRanks(Controller):
    """The rank b of each optimizer step, a function of the seed and the step: the same in all processes and runs."""

    def __init__(self, method: "DyLoRA", adaptation: AdaptedNetwork) -> None:
        super().__init__(adaptation)
        self.method = method
        self._open_gates()

    def rank_of_step(self, step: int) -> int:
        """b of optimizer step ``step``, counted from the first of all runs."""
        digest = hashlib.sha256(f"{self.adaptation.seed} rank {step}".encode()).digest()
        choices = self.method.rank - self.method.min_rank + 1
        return self.method.min_rank + int.from_bytes(digest[:8], "big") % choices

    def _open_gates(self) -> None:
        pairs = self.rank_of_step(self.adaptation.steps_before + self.adaptation.step + 1)
        for layer in self.adaptation.layers.values():
            if isinstance(layer, NestedLinear):
                layer.open_gate(pairs)

    def plan(self, first_step: int, last_step: int, strict: bool) -> str:
        self._open_gates()  # the seed is that of all processes now
        return ""

    def after_optimizer(self, step: int, optimizer: Optimizer | None) -> bool:
        self._open_gates()
        return False

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._open_gates()


class DyLoRA(Method):
    """LoRA that trains with the first b of its pairs, b drawn anew for each step: usable at every rank afterwards.

    All matrices and micro-batches of an optimizer step have one b, uniform in ``min_rank`` to ``rank``, and the pairs
    act with s(b) = alpha / b. Pairs above b have no gradient in that step; an optimizer with momentum or decay moves
    them all the same, as it does in the authors' code.

    Args:
        rank: the largest b, r.
        alpha: strength.
        min_rank: the smallest b.
        evaluation_rank: pairs that act outside training, by default all; it may be another one in every run.
        kwargs: see `Method`; without ``rank_pattern``.

    Raises:
        UserError: a value outside its range.
    """

    layer = NestedLinear
    nested = True
    free_settings = ("evaluation_rank",)

    def __init__(
        self,
        rank: int = 8,
        *,
        alpha: float = 16.0,
        min_rank: int = 1,
        evaluation_rank: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(rank, alpha=alpha, **kwargs)
        self.min_rank, self.evaluation_rank = min_rank, evaluation_rank
        if self.rank_pattern:
            raise UserError(
                f"method.rank_pattern is {self.rank_pattern}, but DyLoRA draws one rank for all matrices: leave it out"
            )
        given: Iterable[tuple[Any, str]] = ((min_rank, "min_rank"), (evaluation_rank or rank, "evaluation_rank"))
        for value, where in given:
            if not isinstance(value, int) or not 1 <= value <= rank:
                raise UserError(f"method.{where} is {value}, it must be a whole number from 1 to the rank {rank}")

    def layer_options(self, name: str) -> dict[str, Any]:
        return {"evaluation_rank": self.evaluation_rank, "use_rslora": self.use_rslora}

    def initialize(self, matrix: Matrix) -> None:
        matrix.A.copy_(kaiming_uniform(matrix.A.shape, matrix.name))

    def controller(self, adaptation: AdaptedNetwork) -> DrawnRanks:
        return DrawnRanks(self, adaptation)
