"""What the pairs of a network were like at a switch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """What is known of some pairs just before a switch; each (pairs,).

    Attributes:
        directions: the singular direction that each was drawn from, counted from 0.
        recycled: whether this switch fuses and re-draws it.
        ages: optimizer steps since it was drawn.
        sizes: its Frobenius norm s |b| |a| when it was drawn.
        scores: S_k (Eq. 7); 0 where nothing is scored.
        changes: Frobenius norm of what s b a^T has changed since it was drawn.
    """

    directions: Tensor
    recycled: Tensor
    ages: Tensor
    sizes: Tensor
    scores: Tensor
    changes: Tensor

    @classmethod
    def joined(cls, parts: Sequence["Pairs"]) -> "Pairs":
        return cls(*map(torch.cat, zip(*parts, strict=True)))


@dataclass(frozen=True)
class SwitchRecord:
    """All pairs of the matrices that switched after one step.

    Attributes:
        step: counted from the first of all runs.
        ranks: how many pairs each of these matrices has, by name.
        pairs: those of one matrix after those of the other.
    """

    step: int
    ranks: Mapping[str, int]
    pairs: Pairs

    @property
    def first_chance(self) -> float | None:
        """Of the pairs that their matrix's last switch drew, the share that this one recycles; None at the first one.

        Chance would recycle as large a share of them as of all pairs.
        """
        sizes = [*self.ranks.values()]
        of_matrices = zip(self.pairs.recycled.split(sizes), self.pairs.ages.split(sizes), strict=True)
        fresh = [recycled[ages == ages.min()] for recycled, ages in of_matrices if ages.min() < self.step]
        return torch.cat(fresh).double().mean().item() if fresh else None

    def state(self) -> dict[str, Any]:
        """In plain containers, on the CPU."""
        return {
            "step": self.step,
            "ranks": dict(self.ranks),
            **{name: values.cpu() for name, values in self.pairs._asdict().items()},
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "SwitchRecord":
        return cls(state["step"], state["ranks"], Pairs(*(state[name] for name in Pairs._fields)))
