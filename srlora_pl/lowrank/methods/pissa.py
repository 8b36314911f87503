"""PiSSA (Meng et al. 2024, arXiv 2404.02948)."""

from srlora_pl.lowrank import recompose
from srlora_pl.lowrank.linear import Matrix
from srlora_pl.lowrank.methods.base import Method
from srlora_pl.lowrank.starts.spectrum import Spectrum
from srlora_pl.util.errors import UserError


class PiSSA(Method):
    """The pairs start on the r leading singular directions of the weight, which loses them (Eq. 2)."""

    needs_spectrum = True

    def directions(self, matrix: Matrix) -> int:
        return matrix.rank

    def start(self, matrix: Matrix, spectrum: Spectrum) -> None:
        if len(spectrum) < matrix.rank:
            raise UserError(
                f"rank {matrix.rank} is above the {len(spectrum)} singular directions that the weight of {matrix.name} "
                "has, lower rank or give this layer its own in rank_pattern"
            )
        recompose.start(matrix, spectrum)
