"""Random directions for re-drawn pairs, in place of the next singular ones."""

from typing import Any

import torch
from torch import Tensor

from srlora_pl.lowrank import SRLoRA
from srlora_pl.lowrank.linear import Matrix
from srlora_pl.lowrank.method import AdaptedNetwork, generator_for
from srlora_pl.lowrank.methods.recording import Recording
from srlora_pl.lowrank.methods.switching import Switching
from srlora_pl.lowrank.starts.spectrum import Spectrum
from srlora_pl.lowrank.switch_records import Pairs


class RandomDirections(SRLoRA):
    """SRLoRA but for the directions; it counts them as SRLoRA counts singular ones, up to ``target_rank``.

    A name for ``model.method.class_path``.
    """

    def controller(self, adaptation: AdaptedNetwork) -> Switching:
        return _Random(self, adaptation)


class _Random(Switching):
    def __init__(self, method: SRLoRA, adaptation: AdaptedNetwork) -> None:
        super().__init__(method, adaptation)
        self.recording = _Unknown()

    def redrawn(self, matrix: Matrix, recycled: Tensor, spectrum: Spectrum) -> tuple[Tensor, Tensor]:
        """As large as the singular directions would be, and orthonormal but for that."""
        B, A = super().redrawn(matrix, recycled, spectrum)
        drawn = len(self.intervals[matrix.name])
        generator = generator_for(f"{matrix.name} {drawn}", self.adaptation.seed)
        U, V = (torch.randn(n, len(recycled), dtype=torch.float64, generator=generator) for n in matrix.shape)
        U, V = torch.linalg.qr(U).Q.to(B), torch.linalg.qr(V).Q.to(A)
        return U * B.norm(dim=0), A.norm(dim=1)[:, None] * V.T


class _Unknown(Recording):
    """How far pairs are from what they were drawn as is not known: that is no part of the spectrum."""

    def look(self, *args: Any) -> Pairs:
        pairs = super().look(*args)
        return pairs._replace(changes=torch.full_like(pairs.changes, torch.nan))
