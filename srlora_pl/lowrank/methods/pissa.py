"""PiSSA (Meng et al. 2024, arXiv 2404.02948)."""

from pathlib import Path

from srlora_pl.lowrank.linear import Matrix
from srlora_pl.lowrank.method import AdaptedNetwork, Method, ShowProgress, Sources
from srlora_pl.lowrank.starts.spectrum import Spectrum, spectra


class PiSSA(Method):
    """The pairs start on the r leading singular directions of the weight, which loses them (Eq. 2)."""

    starts_from = "spectrum"
    moves_weights = True

    def sources(self, progress: ShowProgress = iter, cache: Path | None = None) -> Sources:
        return spectra(progress, cache)

    def start(self, adaptation: AdaptedNetwork, matrix: Matrix, source: Spectrum) -> None:
        source.require(matrix.rank, matrix.name)
        B, A = source.pairs(0, matrix.rank, matrix.scaling, like=matrix.weight)
        adaptation.add(matrix, B, A, -matrix.scaling)
        matrix.B.copy_(B)
        matrix.A.copy_(A)
