"""The history of a frozen weight: W = W0 + sum_i alpha_i B_i A_i, in the order of the updates."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srlora_pl.util.precision import float64_device


@dataclass(frozen=True)
class Update:
    """``alpha * B @ A``, with B (out, k) and A (k, in)."""

    B: Tensor
    A: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    def add_to(self, W: Tensor) -> None:
        """W (out, in) += alpha B A, in place, on W's device."""
        W.addmm_(self.B.to(W.device), self.A.to(W.device), alpha=self.alpha)


class Ledger:
    """The updates of one matrix, in order.

    Attributes:
        shape: (out, in).
        updates: on the CPU; None once they are larger than W itself and W0 can be loaded again.
        rank: columns of all updates together, also of those that are gone.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.updates: list[Update] | None = []
        self.rank = 0

    @property
    def is_larger_than_weight(self) -> bool:
        """Whether the updates hold more numbers than W."""
        return self.rank * sum(self.shape) > math.prod(self.shape)

    def enter(self, update: Update, may_forget: bool) -> None:
        """Append a copy of ``update``; with ``may_forget`` drop all updates where they are larger than W."""
        self.rank += update.rank
        if may_forget and self.is_larger_than_weight:
            self.updates = None
        if self.updates is not None:
            B, A = (factor.detach().to("cpu", copy=True) for factor in (update.B, update.A))
            self.updates.append(Update(B, A, update.alpha))

    def replay(self, W0: Tensor, device: torch.device) -> Tensor:
        """W (out, in) from W0, on ``device``: the same operations in the same order, and so the same bits."""
        updates = self.updates or []
        dtype = updates[0].B.dtype if updates else W0.dtype
        if dtype == torch.float64:  # a run in double precision, perhaps on another machine
            device = float64_device(device)
        W = W0.to(device, dtype, copy=True)
        for update in updates:
            update.add_to(W)
        return W

    def undo(self, W: Tensor) -> None:
        """Turn W (out, in) into W0, in place and equal to rounding."""
        for update in reversed(self.updates or []):
            Update(update.B, update.A, -update.alpha).add_to(W)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """W - W0 as B @ A, with B (out, k) and A (k, in) in float64 on the CPU; only where ``updates`` are known."""
        assert self.updates is not None
        out, in_ = self.shape
        B = [torch.empty(out, 0, dtype=torch.float64), *(each.alpha * each.B.double() for each in self.updates)]
        A = [torch.empty(0, in_, dtype=torch.float64), *(each.A.double() for each in self.updates)]
        return torch.cat(B, 1), torch.cat(A)

    def state_dict(self, with_updates: bool) -> dict[str, Any]:
        updates = self.updates if with_updates else None
        return {"rank": self.rank, "updates": updates and [(each.B, each.A, each.alpha) for each in updates]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rank, updates = state["rank"], state["updates"]
        self.updates = None if updates is None else [Update(B.cpu(), A.cpu(), alpha) for B, A, alpha in updates]
