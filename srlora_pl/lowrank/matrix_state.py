"""What training has done to one adapted matrix: its directions and the ledger of its pairs."""

import math

import torch
from torch import Tensor

from srlora_pl.lowrank.linear import Matrix
from srlora_pl.lowrank.starts.spectrum import Spectrum


class MatrixState:
    """What training has done to one matrix, besides its values.

    Attributes:
        spectrum: of the pretrained weight; None until the start.
        directions: which singular direction each pair was last drawn from, (r,).
        intervals: after which optimizer step each direction was drawn and fused (-1: it is active), (n, 2), int64;
            counted from the first of all runs.
        fused: pairs fused so far, in order, each B (out, r') and A (r', in), on the CPU; None once they take more
            room than the weight itself and W0 can be had again from where it came from.
    """

    def __init__(self, matrix: Matrix) -> None:
        self.spectrum: Spectrum | None = None
        self.directions = torch.arange(matrix.rank)
        self.intervals = torch.tensor([[0, -1]]).repeat(matrix.rank, 1)
        self.fused: list[tuple[Tensor, Tensor]] | None = []
        self._drawn: Spectrum | None = None  # of a loaded state, where the rest of the spectrum is not known

    @property
    def next_direction(self) -> int:
        """The first direction that was never used."""
        return len(self.intervals)

    @property
    def drawn(self) -> Spectrum | None:
        """The directions drawn so far, in memory of their own."""
        return self._drawn if self.spectrum is None else self.spectrum.first(self.next_direction)

    @drawn.setter
    def drawn(self, drawn: Spectrum | None) -> None:
        self._drawn = drawn
        if self.spectrum is not None and drawn is not None:
            self.spectrum = self.spectrum.beginning_with(drawn)

    def record(self, recycled: Tensor, fused: tuple[Tensor, Tensor], step: int) -> None:
        """Pairs ``recycled`` (r',), whose values were ``fused``, were re-drawn after ``step``."""
        first, count = self.next_direction, len(recycled)
        self.intervals[self.directions[recycled], 1] = step
        self.intervals = torch.cat([self.intervals, torch.tensor([[step, -1]]).repeat(count, 1)])
        self.directions[recycled] = torch.arange(first, first + count)
        if self.fused is not None:
            self.fused.append((fused[0].cpu(), fused[1].cpu()))

    def outgrows(self, shape: tuple[int, int]) -> bool:
        """Whether it takes more numbers to rebuild W (out, in) from W0 than W has."""
        pairs = self.next_direction + sum(B.shape[1] for B, _ in self.fused or [])
        return pairs * sum(shape) + self.next_direction > math.prod(shape)
