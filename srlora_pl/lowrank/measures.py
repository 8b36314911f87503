"""What training does, in numbers: how the pairs score, how old they are, and how far the weights have moved."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from srlora_pl.lowrank.adaptation import Adaptation
from srlora_pl.lowrank.delta import stacked
from srlora_pl.lowrank.linear import Matrix
from srlora_pl.lowrank.targets import kind_of, repeated_blocks
from srlora_pl.util.precision import full_precision


def by_kind(adaptation: Adaptation) -> dict[str, list[Matrix]]:
    """The matrices of the same place in their blocks, such as ``attn.qkv[q]``, in the order of the network."""
    kinds, blocks = defaultdict(list), repeated_blocks(adaptation.net)
    for matrix in adaptation.matrices:
        kinds[kind_of(matrix.name, blocks)].append(matrix)
    return dict(kinds)


def scores_by_kind(adaptation: Adaptation) -> dict[str, Tensor]:
    """The importance of all pairs by kind of matrix, on the CPU; waits for the device once. Empty without scores."""
    scores = adaptation.controller.scores()
    if not scores:
        return {}
    kinds = by_kind(adaptation)
    of_kinds = [torch.cat([scores[matrix.name] for matrix in group]) for group in kinds.values()]
    return dict(zip(kinds, torch.cat(of_kinds).cpu().split([len(each) for each in of_kinds]), strict=True))


def drawn_after(histories: Mapping[str, Tensor]) -> Tensor:
    """After which optimizer step each active pair was drawn, (pairs,), int64; 0: at the start.

    Args:
        histories: of `Controller.histories`.
    """
    return torch.cat([intervals[intervals[:, 1] < 0, 0] for intervals in histories.values()])


def switches_survived(histories: Mapping[str, Tensor], drawn: Tensor) -> Tensor:
    """How many switches there were since each active pair was ``drawn`` (see `drawn_after`), (pairs,), int64.

    Counted over the whole network: where each rank walks at its own pace, or a spectrum is used up, the switches of
    other matrices count too.
    """
    switches = torch.cat([intervals[:, 0] for intervals in histories.values()]).unique()
    return len(switches) - torch.searchsorted(switches, drawn, right=True)


@dataclass(frozen=True)
class Size:
    """How large a matrix is, and along how many directions.

    Attributes:
        norm: Frobenius norm.
        stable_rank: squared Frobenius norm over squared spectral norm (Rudelson and Vershynin 2007).
        effective_rank: exp of the entropy of sigma / sum(sigma) (Roy and Vetterli 2007). All are 0 for a zero matrix.
    """

    norm: float
    stable_rank: float
    effective_rank: float

    @classmethod
    def of(cls, sigma: Tensor) -> "Size":
        """From the singular values (k,) of the matrix, the largest first."""
        norm = float(sigma.norm())
        if norm == 0:
            return cls(0.0, 0.0, 0.0)
        entropy = torch.special.entr(sigma / sigma.sum()).sum()
        return cls(norm, float((norm / sigma[0]) ** 2), float(entropy.exp()))


@full_precision()
def size_of_change(adaptation: Adaptation, matrix: Matrix) -> Size | None:
    """W_eff - W0, from its factors in float64; None where these are not known any more or it diverged.

    Takes some k^2 (out + in) operations for k columns, and never the pretrained weights.
    """
    if adaptation.ledgers[matrix].updates is None or not adaptation.method.additive:
        return None
    B, A = stacked(matrix, adaptation.ledgers[matrix])
    # The singular values of a product are those of its small core.
    core = _triangle(B) @ _triangle(A.T).T
    return Size.of(torch.linalg.svdvals(core)) if core.isfinite().all() else None


def _triangle(tall: Tensor) -> Tensor:
    return torch.linalg.qr(tall, mode="r").R
