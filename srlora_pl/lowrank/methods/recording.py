"""The records of SRLoRA's switches: what its pairs are like just before each one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from srlora_pl.lowrank.linear import Matrix
from srlora_pl.lowrank.starts.spectrum import Spectrum
from srlora_pl.lowrank.switch_records import Pairs, SwitchRecord


class Recording:
    """The records of all switches of one network; they stay on the device until somebody reads them.

    Attributes:
        sizes: by matrix, s |b| |a| of each direction when it was drawn, (n,); from the matrix's first switch on.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, Tensor] = {}
        self._records: list[SwitchRecord] = []

    def look(
        self, matrix: Matrix, active: Tensor, ages: Tensor, recycled: Tensor, scores: Tensor | None, spectrum: Spectrum
    ) -> Pairs:
        """What the pairs of ``matrix`` are like before a switch.

        Args:
            active: the directions of ``spectrum`` that they were drawn from, (r,).
            ages: steps since each direction was drawn, (n,).
            recycled: indices of pairs, (r',).
            scores: of all pairs, (r,), if there are any.
        """
        A = matrix.A
        known = self.sizes.get(matrix.name, spectrum.sigma[: len(ages)])  # what a start draws is not rescaled
        self.sizes[matrix.name] = known.to(A.device)
        # U[:, active] takes three times as long.
        U, Vh = spectrum.U.index_select(1, active).to(A.device), spectrum.Vh.index_select(0, active).to(A.device)
        sizes = self.sizes[matrix.name].index_select(0, active.to(A.device))
        chosen = torch.zeros_like(sizes, dtype=torch.bool).index_fill_(0, recycled, True)
        scores = torch.zeros_like(sizes) if scores is None else scores
        return Pairs(active, chosen, ages.index_select(0, active), sizes, scores, changes(matrix, U, Vh, sizes))

    def drawn(self, matrix: Matrix, recycled: Tensor) -> None:
        """Note the sizes of the pairs with the indices ``recycled`` (r',), which were drawn just now."""
        sizes = matrix.scaling * (matrix.B.square().sum(0) * matrix.A.square().sum(1)).sqrt()
        self.sizes[matrix.name] = torch.cat([self.sizes[matrix.name], sizes[recycled]])

    def add(self, step: int, seen: Mapping[Matrix, Pairs]) -> None:
        """Keep what `look` has ``seen`` at a switch after ``step``."""
        if seen:
            ranks = {matrix.name: matrix.rank for matrix in seen}
            self._records.append(SwitchRecord(step, ranks, Pairs.joined([*seen.values()])))

    def read(self) -> list[SwitchRecord]:
        """All of them, on the CPU."""
        self._records = [SwitchRecord.of_state(record.state()) for record in self._records]
        return self._records

    def state_dict(self) -> dict[str, Any]:
        return {"sizes": dict(self.sizes), "records": [record.state() for record in self.read()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; one of before there were records is empty."""
        self.sizes = dict(state.get("sizes", {}))
        self._records = [SwitchRecord.of_state(each) for each in state.get("records", [])]


def changes(matrix: Matrix, U: Tensor, Vh: Tensor, sizes: Tensor) -> Tensor:
    """The Frobenius norm of s b a^T - size u v^T for each pair of ``matrix``, (r,).

    The parts of b and a along u and v and across them have four products that are orthogonal to each other, so that a
    small change is no difference of large numbers: in float32 it is known to some 1e-7 of the size.

    Args:
        U: the unit vectors u that the pairs were drawn from, (out, r).
        Vh: their v, (r, in).
        sizes: of the pairs when they were drawn, (r,).
    """
    B, A, s = matrix.B, matrix.A, matrix.scaling
    along_B, along_A = (U * B).sum(0), (Vh * A).sum(1)
    across_B, across_A = (B - U * along_B).square_().sum(0), (A - along_A[:, None] * Vh).square_().sum(1)
    crossed = along_B.square() * across_A + across_B * (along_A.square() + across_A)
    return ((s * along_B * along_A - sizes).square() + s**2 * crossed).sqrt()
